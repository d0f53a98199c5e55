"""What of a generated text is compared, and with which scores."""

import pytest

from fedelta.errors import FedeltaError
from fedelta.tasks.answers import ANSWERS
from fedelta.tasks.text_scores import check_installed, text_scores


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        ("text", "  Two   words\n", "two words"),
        ("text", " ", None),
        ("number", "so 3 + 4 = 7\n#### 7", "7"),
        ("number", "#### $1,234.50", "1234.5"),
        ("number", "The answer is: 12 apples, of which 5 are red", "5"),
        ("number", "it costs $2.00.", "2"),
        ("number", "minus -3", "-3"),
        ("number", "none", None),
        ("number", "#### 7\n8 more", "7"),
        ("number", "a range of 10-12", "12"),
        ("number", "one of 1,2,3", "3"),
        ("number", "5-3", "3"),
        ("boxed", r"so \boxed{\dfrac12}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1/2} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1,000}", "1000"),
        ("boxed", r"\boxed{x = \{1, 2\}}", r"x=\{1,2\}"),
        ("boxed", r"\boxed{\text{yes}}", "yes"),
        ("boxed", r"\boxed{never closed", None),
        ("boxed", "7", None),
        ("boxed", "The answer is: \\frac12.\nNo more", r"\frac{1}{2}"),
        ("boxed", "the answer is:", None),
        ("option", "the correct answer is answer2", "answer2"),
        ("option", "The correct answer is True.", "true"),
        ("option", "ending 3, not ending 4", "ending3"),
        ("option", "I do not know", None),
    ],
)
def test_the_answer_in_a_text(form: str, text: str, answer: str | None) -> None:
    assert ANSWERS[form](text) == answer  # type: ignore[index]


SCORES = ("bleu", "nist", "rouge_l", "cider")
SENTENCES = [
    "The Phoenix is a cheap pub near the river.",
    "Aromi serves Chinese food in the city centre.",
    "For families there is the Green Man, with a high rating.",
]


def test_a_text_that_is_one_of_its_references_has_full_scores() -> None:
    found = text_scores([(text, ["something else entirely", text]) for text in SENTENCES], SCORES)
    assert found["bleu"] == pytest.approx(1)
    assert found["rouge_l"] == pytest.approx(1)
    assert found["nist"] > 3
    assert found["cider"] > 1


def test_a_worse_text_has_lower_scores() -> None:
    good = text_scores([(text, [text]) for text in SENTENCES], SCORES)
    words = text_scores([(" ".join(text.split()[::-1]), [text]) for text in SENTENCES], SCORES)
    nothing = text_scores([("", [text]) for text in SENTENCES], SCORES)
    for name in SCORES:
        assert good[name] > words[name] >= nothing[name] == 0


def test_nist_of_short_texts_is_of_shorter_n_grams() -> None:
    assert text_scores([("red .", ["red ."]), ("blue .", ["blue ."])], ("nist",))["nist"] > 0


def test_bleu_takes_texts_with_different_numbers_of_references() -> None:
    pairs = [(SENTENCES[0], [SENTENCES[0]]), (SENTENCES[1], ["no", SENTENCES[1], "neither"])]
    assert text_scores(pairs, ("bleu",))["bleu"] == pytest.approx(1)


def test_a_score_whose_package_is_missing_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedelta.tasks.text_scores.find_spec", lambda name: None if name == "sacrebleu" else object())
    with pytest.raises(FedeltaError, match=r"score bleu needs sacrebleu: pip install 'fedelta\[generation\]'"):
        check_installed(("bleu",))


def test_meteor_needs_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedelta.tasks.text_scores._wordnet", lambda: False)
    with pytest.raises(FedeltaError, match="score meteor needs WordNet: python -m nltk.downloader wordnet"):
        check_installed(("meteor",))
