"""Why a client has no update, as one of a few kinds. Only the kind leaves a site.

The text of an error may quote a row, a label or a path. It is shown at the site and written to the site's log. The
server receives the kind alone, and finds the words for it here.
"""

from collections.abc import Mapping
from typing import Any, Final

from fedelta.errors import BadUpdate, ClientFailed, FedeltaError

FAILURE: Final = "failure"
"""Key of the kind among the facts of a reply."""
SETTING: Final = "setting"
"""Key of the name of the setting in which a site differs from the server, for the kind `settings`."""

REFUSALS: Final = {
    "input": "it can't train with its rows, its model or this broadcast",
    "broadcast": "it can't use what the server sent",
    "settings": "its settings are not the server's",
    "rows": "its rows can't be used",
    "model": "its model can't be used",
    "name": "it is another site than the server thinks",
}
"""Kinds that will not pass by themselves, and their words at the server."""
INTERRUPTIONS: Final = {
    "device": "its device ran out of memory, or lacks an operation",
    "starting": "it is not ready yet",
    "program": "its program failed",
}
"""Kinds that say nothing about the update, and may pass."""
HINT = "; its own log says why"


class SiteRefusal(FedeltaError):
    """A site can't take part.

    Args:
        kind: the kind that the server is told.
        text: the reason, which stays at the site.
        setting: name of the setting that differs. The name is the server's.
    """

    def __init__(self, kind: str, text: str, setting: str = "") -> None:
        super().__init__(text)
        self.kind = kind
        self.setting = setting


def failure_facts(error: Exception) -> dict[str, str]:
    """Return the facts of a reply that has an error instead of an update. They hold nothing but fixed words."""
    if isinstance(error, FedeltaError):
        setting = error.setting if isinstance(error, SiteRefusal) else ""
        return {FAILURE: error.kind} | ({SETTING: setting} if setting else {})
    return {FAILURE: "device" if isinstance(error, MemoryError) else "program"}


def is_refusal(facts: Mapping[str, Any]) -> bool:
    """Whether a site reports a failure that will not pass by itself."""
    return facts.get(FAILURE) in REFUSALS


def failure_words(facts: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> str:
    """Return the server's words for a failure. No text of the site is quoted.

    Args:
        facts: facts of the reply.
        settings: the settings that the site was asked about; the name of one of them may be quoted.
    """
    kind, setting = facts.get(FAILURE), facts.get(SETTING)
    words = {**REFUSALS, **INTERRUPTIONS}.get(kind) if isinstance(kind, str) else None
    if kind == "settings" and isinstance(setting, str) and setting in (settings or {}):
        words = f"its {setting} is not the server's"
    return (words or "it failed in a way that this version does not know") + HINT


def read_failure(client: str, facts: Mapping[str, Any]) -> BadUpdate | ClientFailed:
    """Return the error of a client whose reply reports a failure."""
    kind = BadUpdate if is_refusal(facts) else ClientFailed
    return kind(client, failure_words(facts))
