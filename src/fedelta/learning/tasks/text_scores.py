"""Scores of generated texts against references, by kept packages of the extra `generation`."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal

from fedelta.errors import FedeltaError

TextScore = Literal["bleu", "nist", "meteor", "rouge_l", "cider"]
Pairs = Sequence[tuple[str, Sequence[str]]]
"""Generated text, and its references."""


def _bleu(pairs: Pairs) -> float:
    """TokenizedSplits BLEU-4 with the tokens of mteval-13a in lower case, as E2E's own script counts; from 0 to 1."""
    import sacrebleu

    # References of the same rank together; a text with fewer of them has None, which is left out.
    most = max(len(references) for _, references in pairs)
    streams: Any = [[refs[i] if i < len(refs) else None for _, refs in pairs] for i in range(most)]
    return sacrebleu.corpus_bleu([text for text, _ in pairs], streams, lowercase=True).score / 100


def _nist(pairs: Pairs) -> float:
    """NIST-5 of nltk, on the same tokens; of shorter n-grams where no text has five of them, 0 where none has any."""
    from nltk.translate.nist_score import corpus_nist

    texts = [_tokens(text) for text, _ in pairs]
    longest = min(5, max(map(len, texts)))
    if longest == 0:
        return 0.0
    return float(corpus_nist([[_tokens(r) for r in references] for _, references in pairs], texts, n=longest))


def _meteor(pairs: Pairs) -> float:
    """METEOR 1.5, of which pycocoevalcap carries the program and its paraphrases."""
    return _coco("meteor.meteor", "Meteor", pairs)


def _rouge_l(pairs: Pairs) -> float:
    return _coco("rouge.rouge", "Rouge", pairs)


def _cider(pairs: Pairs) -> float:
    return _coco("cider.cider", "Cider", pairs)


def _coco(module: str, name: str, pairs: Pairs) -> float:
    """A scorer of the COCO caption evaluation, which E2E's own uses too."""
    from importlib import import_module

    texts = {i: [" ".join(_tokens(text))] for i, (text, _) in enumerate(pairs)}
    wanted = {i: [" ".join(_tokens(r)) for r in references] for i, (_, references) in enumerate(pairs)}
    score, _ = getattr(import_module(f"pycocoevalcap.{module}"), name)().compute_score(wanted, texts)
    return float(score)


def _tokens(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    # METEOR's program takes a line, with bars between texts.
    return Tokenizer13a()(text.lower().replace("|||", " ")).split()


SCORERS: dict[str, tuple[Callable[[Pairs], float], tuple[str, ...]]] = {
    "bleu": (_bleu, ("sacrebleu",)),
    "nist": (_nist, ("sacrebleu", "nltk")),
    "meteor": (_meteor, ("sacrebleu", "pycocoevalcap")),
    "rouge_l": (_rouge_l, ("sacrebleu", "pycocoevalcap")),
    "cider": (_cider, ("sacrebleu", "pycocoevalcap")),
}


def check_installed(names: Sequence[TextScore]) -> None:
    """Before a run, not after it.

    Raises:
        FedeltaError: naming what is missing.
    """
    for name in names:
        for package in SCORERS[name][1]:
            if find_spec(package) is None:
                raise FedeltaError(f"score {name} needs {package}: pip install 'fedelta[generation]'")
        if name == "meteor" and which("java") is None:
            raise FedeltaError("score meteor needs java on the PATH, found none")


def text_scores(pairs: Pairs, names: Sequence[TextScore]) -> dict[str, Any]:
    """Scores by name; METEOR, BLEU and ROUGE-L from 0 to 1, NIST and CIDEr without an upper end."""
    return {name: SCORERS[name][0](pairs) for name in names}
