"""Chats are rendered once, for training, generation and comparison alike, and equal on every day."""

import os
import time
from typing import Any

import pytest
from datasets import Dataset

from chats import BRACKETS, CHATML, DATED, ENDLESS_TURN, OPEN_THOUGHT, THINKS, WORKING, byte_tokenizer
from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.examples import Completions
from fedelta.learning.tasks import Completion, template_sandbox
from fedelta.learning.tasks.chat_template import ChatTemplate
from fedelta.learning.tasks.turns import Turns

DATE = "2024-07-26"
ANSWERS = [
    "blue",
    " a blue one",
    "\nblue",
    "\n\n- one\n- two",
    "blue\n",
    "  blue  ",
    "<think>\nwhy\n</think>\n\nblue",
    "<think>\n\n</think>\n\nblue",
    "Grün: 蓝 🙂",
    "x</think>y",
]


def examples(template: str | None, answers: list[str], **settings: Any) -> Completions:
    rows = Dataset.from_list([{"prompt": f"color {i}:", "completion": answer} for i, answer in enumerate(answers)])
    task = Completion(generate={"max_new_tokens": 500}, **settings)
    return task.examples(rows, DataSettings(source="x.csv", max_length=1000), [], byte_tokenizer(template))


@pytest.mark.parametrize("template", WORKING.values(), ids=WORKING)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_model_that_repeats_what_it_was_taught_is_right(template: str, answer: str) -> None:
    tokenizer = byte_tokenizer(template)
    told = examples(template, [answer])
    tokens, labels = told.features[0]["input_ids"], told.labels[0]
    known = sum(label == -100 for label in labels)
    assert tokens[:known] == told.prompts[0], "generation begins where the loss begins"
    taught = tokens[known:]
    turns = Turns(tokenizer, DATE)
    assert taught[-1] == turns.end
    generated = turns.answer(tokenizer.decode(taught, skip_special_tokens=True))
    assert generated == told.references[0] != ""
    assert generated == answer.strip() or "think" in answer
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "color 0:"}], add_generation_prompt=True, date_string="26 Jul 2024"
    )["input_ids"]
    assert told.prompts[0] == question, "the prompt is what a server renders"


@pytest.mark.parametrize("template", WORKING.values(), ids=WORKING)
def test_a_chat_is_rendered_as_transformers_renders_it(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    chat = [{"role": role, "content": f" {role} says\n"} for role in ("user", "assistant", "user", "assistant")]
    for messages, more in ((chat[:1], True), (chat[:2], False), (chat, False), (chat[:3], True)):
        theirs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=more, tokenize=False, date_string="26 Jul 2024"
        )
        assert ChatTemplate(tokenizer, DATE).render(messages, more) == theirs
    theirs = tokenizer.apply_chat_template(
        chat[:2], continue_final_message=True, tokenize=False, date_string="26 Jul 2024"
    )
    ours = ChatTemplate(tokenizer, DATE).render_up_to_last(chat[:2])
    assert ours.rstrip() == theirs.rstrip()


def test_an_empty_block_of_thoughts_before_an_answer_is_taught_but_not_compared() -> None:
    told = examples(THINKS, ["blue", "red"])
    assert told.references == ["blue", "red"]
    taught = byte_tokenizer().decode([label for label in told.labels[0] if label != -100])
    assert taught == "<think>\n\n</think>\n\nblue<end>"
    assert Turns(byte_tokenizer(THINKS), DATE).answer("<think>\n\n</think>\n\n red") == "red"
    assert Turns(byte_tokenizer(THINKS), DATE).answer("red") == "red", "a model may leave the block out"


def test_the_date_of_a_template_is_the_configured_one_on_every_day_and_in_every_time_zone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = set()
    for zone in ("UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        texts.add(byte_tokenizer().decode(examples(DATED, ["blue"]).prompts[0]))
    assert len(texts) == 1
    assert "Today: 26 Jul 2024" in texts.pop()
    assert os.environ["TZ"]
    monkeypatch.undo()
    time.tzset()
    assert "Today: 01 Feb 2031" in byte_tokenizer().decode(examples(DATED, ["blue"], date="2031-02-01").prompts[0])


@pytest.mark.parametrize("value", ["2024-02-30", "today", 7])
def test_a_date_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="expected a date, such as 2024-07-26"):
        Completion(date=value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS_TURN, "puts no special token after an answer"),
        (OPEN_THOUGHT, r"changes the prompt's turn when an answer follows it: '<think>' becomes 'b"),
        (CHATML.replace("<end>", "<end>{{ ['a','b'] | random }}"), "draws at random"),
        (CHATML.replace("{{ m.role }}", "{{ m.role.upper }}"), "it prints a "),
        (CHATML.replace("{{ m.role }}", "{{ raise_exception }}"), "it prints a function"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 20,000 steps"),
        ("{% for a in 'x' * 100 recursive %}{{ loop('x' * 100) }}{% endfor %}", "TooMuch|RecursionError"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}", "steps"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "TooMuch"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "TooMuch"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x|replace('a','aa') %}{% endfor %}",
            "TooMuch",
        ),
        ("{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60, "TooMuch"),
        ("{{ 'x' * 10**10 }}", "TooMuch"),
        ("{{ 'x' | center(10**9) }}", "TooMuch"),
        ("{{ '{:>1000000000}'.format('x') }}", "TooMuch"),
        ("{{ '%1000000000d' % 1 }}", "TooMuch"),
        ("{{ '%1000000000d' | format(1) }}", "TooMuch"),
        ("{{ strftime_now('%1000000000Y') }}", "TooMuch"),
        ("{{ 10 ** 10 ** 10 }}", "TooMuch"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError|unsafe"),
        ("{{ lipsum() }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "fails"),
        ("x" * 2_000_000, "2,000,000 characters"),
    ],
)
def test_a_template_that_cannot_be_taught_or_never_ends_is_refused_in_one_line(
    template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 20_000)
    start = time.monotonic()
    with pytest.raises(FedeltaError, match=reason) as refused:
        examples(template, ["blue"])
    assert time.monotonic() - start < 8
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)


def test_a_row_that_a_template_refuses_is_named() -> None:
    template = CHATML.replace("{{ m.role }}", "{{ raise_exception('odd') if 'bad' in m.content else m.role }}")
    with pytest.raises(FedeltaError, match=r"row 3: the tokenizer's chat template fails: TemplateError: odd"):
        examples(template, ["a", "b", "bad", "c"])
    with pytest.raises(FedeltaError, match="row 2: .*puts no end after the answer"):
        examples(
            CHATML.replace("{{ m.content }}<end>", "{{ m.content }}{{ '' if 'bad' in m.content else '<end>' }}"),
            ["a", "bad"],
        )


@pytest.mark.parametrize("answer", ["blue", "\nblue", "\n\nblue", " a", "a"])
def test_a_plain_answer_is_generated_from_the_tokens_that_are_trained(answer: str) -> None:
    """The prompt ends with a colon, which is one token with a line break after it."""
    told = examples(None, [answer])
    known = sum(label == -100 for label in told.labels[0])
    assert byte_tokenizer().decode(told.prompts[0]) == "color 0:"
    assert told.features[0]["input_ids"][:known] == told.prompts[0]
    assert told.references == [answer.strip()]


def test_a_space_between_prompt_and_answer_belongs_to_the_answers_first_token() -> None:
    rows = Dataset.from_list([{"prompt": "color", "completion": "a"}])
    task = Completion(prompt="{prompt}: ", generate={})
    told = task.examples(rows, DataSettings(source="x.csv", max_length=100), [], byte_tokenizer())
    assert byte_tokenizer().decode(told.prompts[0]) == "color:"
    assert byte_tokenizer().decode(told.features[0]["input_ids"]) == "color: a<eos>"
    assert told.references == ["a"]


def test_a_template_that_alternates_roles_reads_one_turn_of_each() -> None:
    assert byte_tokenizer().decode(examples(BRACKETS, ["blue"]).features[0]["input_ids"]) == (
        "<bos>[ASK] color 0: [/ASK] blue<eos>"
    )
