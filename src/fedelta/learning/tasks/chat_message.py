"""One message of a conversation, in the forms in which data sets write it, as a chat template reads it."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from fedelta.errors import FedeltaError, one_line
from fedelta.settings import nearest

MessageForm = Literal["messages", "sharegpt"]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
"""Value of `from` → role."""
_KEYS: dict[MessageForm, tuple[str, str]] = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
_SWITCHES = ("weight", "train", "training")
"""Keys by which some data sets exclude an answer from training: `weight: 0` and `train: false`."""


def form_of(value: Any) -> MessageForm:
    """The form of a message, by its keys.

    Raises:
        FedeltaError: if it is not a message.
    """
    if isinstance(value, Mapping):
        for form, (role, _) in _KEYS.items():
            if role in value:
                return form
    keys = f"the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else _shown(value)
    raise FedeltaError(f"found {one_line(keys, 60)}, expected a message with role and content, or from and value")


def read_message(value: Any, form: MessageForm) -> tuple[dict[str, Any], bool]:
    """Read a message.

    Args:
        value: the message. Its keys without a value (null) are left out, but not those in the arguments of a call.
        form: `messages` (role and content) or `sharegpt` (from and value).

    Returns:
        The message with `role`, `content` as text unless it has only tool calls, and further keys as they are; and
        whether the data allow to train it.

    Raises:
        FedeltaError: if it is in another form, or has an unknown role or content other than text.
    """
    if isinstance(value, Mapping):
        value = _with_values(value)
    if form_of(value) != form:
        raise FedeltaError(f"found a message with {' and '.join(_KEYS[form_of(value)])}, expected {form}")
    role_key, content_key = _KEYS[form]
    rest = {key: inner for key, inner in value.items() if key not in (role_key, content_key, *_SWITCHES)}
    role, content = value[role_key], value.get(content_key)
    known = ROLES if form == "messages" else tuple(SHAREGPT_ROLES)
    if role not in known:
        hint = nearest(str(role), known)
        raise FedeltaError(f"{role_key} is {_shown(role)}, expected {', '.join(known)}{hint}")
    if form == "sharegpt":
        if role == "function_call":
            return {"role": "assistant", "tool_calls": _calls_in(_text(content, content_key)), **rest}, _trained(value)
        role = SHAREGPT_ROLES[role]
    message: dict[str, Any] = {"role": role}
    if content is not None or not rest.get("tool_calls"):
        message["content"] = _text(content, content_key)
    if rest.get("tool_calls"):
        if role != "assistant":
            raise FedeltaError(f"a {role} has tool_calls, expected them of an assistant only")
        rest["tool_calls"] = [_with_arguments(call) for call in _listed(rest["tool_calls"], "tool_calls")]
    else:
        rest.pop("tool_calls", None)
    return {**message, **rest}, _trained(value)


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Read the cell of a column of tools: a list of JSON schemas, or its JSON text.

    Raises:
        FedeltaError: if it is neither.
    """
    tools = [_parsed(tool, "a tool") for tool in _listed(_parsed(value, "the cell"), "the cell")]
    for tool in tools:
        if not isinstance(tool, dict):
            raise FedeltaError(f"found {_shown(tool)}, expected a list of tools, each a JSON schema")
    return tools


def _text(content: Any, key: str) -> str:
    """The content of a message: a text, or a list of parts that are texts."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise FedeltaError(f"{key} has a part of type {_shown(kind)}, expected parts of type text")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        found = "no " + key if content is None else f"{key} {_shown(content)}"
        raise FedeltaError(f"found {found}, expected a text")
    return content


def _trained(value: Mapping[str, Any]) -> bool:
    """Whether the data allow to train a message."""
    for key in _SWITCHES:
        if key in value:
            if value[key] not in (0, 1):
                raise FedeltaError(f"{key} is {_shown(value[key])}, expected 0 or 1 (false or true)")
            return bool(value[key])
    return True


def _calls_in(text: str) -> list[dict[str, Any]]:
    """The tool calls in the value of a `function_call`: one object, or a list of them."""
    parsed = _parsed(text, "the function call")
    calls = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        if not isinstance(call, dict) or not {"name", "arguments"} <= set(call):
            raise FedeltaError(f"function_call is {_shown(text)}, expected JSON with name and arguments")
    return [_with_arguments({"type": "function", "function": call}) for call in calls]


def _with_arguments(call: Any) -> dict[str, Any]:
    """A tool call whose arguments are an object. Templates would quote JSON text once more."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise FedeltaError(f"tool_calls has {_shown(call)}, expected an object with a function's name and arguments")
    call, function = _with_values(call), _with_values(function)
    arguments = _parsed(function.get("arguments", {}), "the arguments of a tool call")
    if not isinstance(arguments, dict):
        raise FedeltaError(f"the arguments of a tool call are {_shown(arguments)}, expected an object")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _parsed(value: Any, what: str) -> Any:
    """A value, read from JSON if it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise FedeltaError(f"{what} is {_shown(value)}, expected JSON") from error


def _with_values(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if inner is not None}


def _listed(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FedeltaError(f"{what} is {_shown(value)}, expected a list")
    return value


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)
