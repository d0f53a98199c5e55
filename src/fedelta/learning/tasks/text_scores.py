"""Scores of generated texts against references, computed by the packages of the extra `generation`."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal

from fedelta.errors import FedeltaError

TextScore = Literal["bleu", "nist", "meteor", "rouge_l", "cider"]
Pairs = Sequence[tuple[str, Sequence[str]]]
"""Pairs of a generated text and its references."""


def _bleu(pairs: Pairs) -> float:
    """Corpus BLEU-4 in [0, 1] on lower-case mteval-13a tokens, as in E2E's own script."""
    import sacrebleu

    # Stream i holds the i-th reference of each text, or None, which sacrebleu ignores.
    count = max(len(references) for _, references in pairs)
    streams: Any = [[refs[i] if i < len(refs) else None for _, refs in pairs] for i in range(count)]
    return sacrebleu.corpus_bleu([text for text, _ in pairs], streams, lowercase=True).score / 100


def _nist(pairs: Pairs) -> float:
    """NIST-5 by nltk on the same tokens. If all texts are shorter than five tokens, n is the longest length.

    It is 0 if no text has a token.
    """
    from nltk.translate.nist_score import corpus_nist

    texts = [_tokens(text) for text, _ in pairs]
    longest = min(5, max(map(len, texts)))
    if longest == 0:
        return 0.0
    return float(corpus_nist([[_tokens(r) for r in references] for _, references in pairs], texts, n=longest))


def _meteor(pairs: Pairs) -> float:
    """METEOR 1.5. pycocoevalcap includes the program and its paraphrase tables."""
    return _coco("meteor.meteor", "Meteor", pairs)


def _rouge_l(pairs: Pairs) -> float:
    return _coco("rouge.rouge", "Rouge", pairs)


def _cider(pairs: Pairs) -> float:
    return _coco("cider.cider", "Cider", pairs)


def _coco(module: str, name: str, pairs: Pairs) -> float:
    """Run a scorer of the COCO caption evaluation, which E2E's own script uses too."""
    from importlib import import_module

    texts = {i: [" ".join(_tokens(text))] for i, (text, _) in enumerate(pairs)}
    references_of = {i: [" ".join(_tokens(r)) for r in references] for i, (_, references) in enumerate(pairs)}
    score, _ = getattr(import_module(f"pycocoevalcap.{module}"), name)().compute_score(references_of, texts)
    return float(score)


def _tokens(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    # METEOR's program reads texts from one line, separated by |||.
    return Tokenizer13a()(text.lower().replace("|||", " ")).split()


SCORERS: dict[str, tuple[Callable[[Pairs], float], tuple[str, ...]]] = {
    "bleu": (_bleu, ("sacrebleu",)),
    "nist": (_nist, ("sacrebleu", "nltk")),
    "meteor": (_meteor, ("sacrebleu", "pycocoevalcap")),
    "rouge_l": (_rouge_l, ("sacrebleu", "pycocoevalcap")),
    "cider": (_cider, ("sacrebleu", "pycocoevalcap")),
}


def check_installed(names: Sequence[TextScore]) -> None:
    """Check that the programs behind these scores are installed, so that a run fails early.

    Raises:
        FedeltaError: naming the package or program that is missing.
    """
    for name in names:
        for package in SCORERS[name][1]:
            if find_spec(package) is None:
                raise FedeltaError(f"score {name} needs {package}: pip install 'fedelta[generation]'")
        if name == "meteor" and which("java") is None:
            raise FedeltaError("score meteor needs java on the PATH, found none")


def text_scores(pairs: Pairs, names: Sequence[TextScore]) -> dict[str, Any]:
    """Compute these scores. BLEU, METEOR and ROUGE-L are in [0, 1]; NIST and CIDEr have no upper bound."""
    return {name: SCORERS[name][0](pairs) for name in names}
