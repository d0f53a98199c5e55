"""Extraction of answers from generated texts, and scores of generated texts."""

import time
from shutil import which

import pytest

from fedelta.errors import FedeltaError
from fedelta.learning.tasks.answers import ANSWERS
from fedelta.learning.tasks.text_scores import check_installed, text_scores


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        ("text", "  Two   words\n", "two words"),
        ("text", " ", None),
        ("number", "so 3 + 4 = 7\n#### 7", "7"),
        ("number", "#### $1,234.50", "1234.5"),
        ("number", "The answer is: 12 apples, of which 5 are red", "12"),
        ("number", "first 3, so the answer is clear: 4 of 5", "4"),
        ("number", "it costs $2.00.", "2"),
        ("number", "minus -3", "-3"),
        ("number", "minus \N{MINUS SIGN}3", "-3"),
        ("number", "none", None),
        ("number", "#### none of 3", "3"),
        ("number", "#### 7\n8 more", "7"),
        ("number", "a range of 10-12", "12"),
        ("number", "one of 1,2,3", "3"),
        ("number", "5-3", "3"),
        ("boxed", r"\boxed{x = \{1, 2\}}", r"\{1,2\}"),
        ("boxed", r"\boxed{\text{yes}}", "yes"),
        ("boxed", r"\boxed{never closed", None),
        ("boxed", r"\boxed{5} and \boxed{never closed", "5"),
        ("boxed", "7", None),
        ("boxed", "The answer is: \\frac12.\nNo more", "1/2"),
        ("boxed", "The final answer is $5$. I hope it is correct.", "5"),
        ("boxed", "The answer is:\n5", "5"),
        ("boxed", "the answer is:", None),
        ("option", "the correct answer is answer2", "answer2"),
        ("option", "The correct answer is True.", "true"),
        ("option", "is it true? the correct answer is false", "false"),
        ("option", "answer: 2", "answer2"),
        ("option", "ending 3, not ending 4", "ending3"),
        ("option", "I do not know", None),
    ],
)
def test_the_answer_is_extracted_from_a_text(form: str, text: str, answer: str | None) -> None:
    assert ANSWERS[form](text) == answer  # type: ignore[index]


@pytest.mark.parametrize(
    "spellings",
    [
        (
            r"\boxed{\frac{1}{2}}",
            r"\boxed{\dfrac12}",
            r"\boxed{1/2}",
            r"\boxed{0.5}",
            r"\boxed{.5}",
            r"\boxed{\frac{2}4}",
        ),
        (
            r"\boxed{5}",
            r"\boxed 5",
            r"\fbox{5}",
            r"\boxed{5.0}",
            r"\boxed{x=5}",
            r"\boxed{\mathbf{5}}",
            r"$\boxed{5.}$",
        ),
        (r"\boxed{-\frac{1}{2}}", r"\boxed{-1/2}", r"\boxed{\frac{-1}{2}}", r"\boxed{-.5}"),
        (r"\boxed{\frac{1}{72}}", r"\boxed{\frac1{72}}", r"\boxed{\tfrac{1}{72}}"),
        (r"\boxed{\sqrt{3}}", r"\boxed{\sqrt3}", r"\boxed{\!\sqrt 3}"),
        (
            r"\boxed{10}",
            r"\boxed{10\text{ cm}}",
            r"\boxed{10^\circ}",
            r"\boxed{10^ {\circ}}",
            r"\boxed{\$10}",
            r"\boxed{10\%}",
        ),
        (r"\boxed{10000}", r"\boxed{10,000}", r"\boxed{10{,}000}", r"\boxed{10\,000}"),
        (r"\boxed{12_3}", r"\boxed{12_{3}}"),
        (r"\boxed{[2,5]}", r"\boxed{x\in[2,5]}", r"\boxed{x \in \left[2, 5\right]}"),
        (r"\boxed{(A)}", r"\boxed{\textbf{(A)}}", r"\boxed{\text{(A)}}"),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
    ],
)
def test_spellings_of_one_answer_are_equal(spellings: tuple[str, ...]) -> None:
    answers = {ANSWERS["boxed"](text) for text in spellings}
    assert len(answers) == 1
    assert None not in answers


def test_different_answers_stay_different() -> None:
    texts = [
        "(2,100)",
        "(2100)",
        "2,100",
        "[0,100)",
        "[0100)",
        "1,2,100",
        "1,2100",
        r"\frac{1}{3}",
        "0.333",
        "x+1",
        "x",
    ]
    assert len({ANSWERS["boxed"](rf"\boxed{{{text}}}") for text in texts}) == len(texts)


SCORES = ("bleu", "nist", "rouge_l", "cider")
SENTENCES = [
    "The Phoenix is a cheap pub near the river.",
    "Aromi serves Chinese food in the city centre.",
    "For families there is the Green Man, with a high rating.",
]


def test_a_text_that_equals_one_of_its_references_has_full_scores() -> None:
    scores = text_scores([(text, ["something else entirely", text]) for text in SENTENCES], SCORES)
    assert scores["bleu"] == pytest.approx(1)
    assert scores["rouge_l"] == pytest.approx(1)
    assert scores["nist"] > 3
    assert scores["cider"] > 1


def test_a_worse_text_has_lower_scores() -> None:
    good = text_scores([(text, [text]) for text in SENTENCES], SCORES)
    shuffled = text_scores([(" ".join(text.split()[::-1]), [text]) for text in SENTENCES], SCORES)
    empty = text_scores([("", [text]) for text in SENTENCES], SCORES)
    for name in SCORES:
        assert good[name] > shuffled[name] >= empty[name] == 0


def test_nist_of_short_texts_uses_shorter_n_grams() -> None:
    assert text_scores([("red .", ["red ."]), ("blue .", ["blue ."])], ("nist",))["nist"] > 0


def test_bleu_accepts_texts_with_different_numbers_of_references() -> None:
    pairs = [(SENTENCES[0], [SENTENCES[0]]), (SENTENCES[1], ["no", SENTENCES[1], "neither"])]
    assert text_scores(pairs, ("bleu",))["bleu"] == pytest.approx(1)


def test_a_score_whose_package_is_missing_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedelta.learning.tasks.text_scores.find_spec", lambda name: None if name == "sacrebleu" else object()
    )
    with pytest.raises(FedeltaError, match=r"score bleu needs sacrebleu: pip install 'fedelta\[generation\]'"):
        check_installed(("bleu",))


def test_meteor_needs_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedelta.learning.tasks.text_scores.which", lambda _: None)
    with pytest.raises(FedeltaError, match="score meteor needs java on the PATH"):
        check_installed(("meteor",))


@pytest.mark.slow
@pytest.mark.skipif(which("java") is None, reason="METEOR is a program in Java")
def test_meteor_recognizes_similar_words() -> None:
    def meteor(text: str, *references: str) -> float:
        return text_scores([(text, references)], ("meteor",))["meteor"]

    assert meteor(SENTENCES[0], "no ||| such", SENTENCES[0].upper()) == pytest.approx(1)
    assert 1 > meteor("cheap pubs by a river", "a cheap pub by the river") > meteor("", "a cheap pub") == 0


def test_scores_ignore_case() -> None:
    upper = text_scores([(text.upper(), [text]) for text in SENTENCES], ("bleu", "nist"))
    assert upper == text_scores([(text, [text]) for text in SENTENCES], ("bleu", "nist"))


def test_an_endless_answer_costs_no_time_and_is_no_error() -> None:
    digits = "9" * 5000
    assert ANSWERS["boxed"](rf"\boxed{{{digits}}}") == digits
    assert ANSWERS["boxed"](rf"\boxed{{\frac{{{digits}}}{{{digits}}}}}") is not None
    started = time.process_time()
    ANSWERS["boxed"](r"\boxed{" * 5000)
    assert time.process_time() - started < 2
