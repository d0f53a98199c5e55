"""Answers of the final model are shown on the terminal and in the report, next to those of the initial model."""

import doctest
import io
import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from rich.console import Console

from causal import TASK
from chats import CHATML, byte_tokenizer
from command import fedelta as command
from fedelta.cli.examples import print_examples
from fedelta.federation.generations import Generations
from fedelta.learning.tasks.metrics import METRICS
from fedelta.runs.comparison import comparison_configs, run_comparison
from fedelta.runs.report import examples
from fedelta.runs.report.examples import last_turn, pick_examples
from fedelta.runs.report.page import write_page
from fedelta.runs.report.plot import plot_scores
from fedelta.runs.report.summary import cells, columns, more_metrics, summarize
from fedelta.runs.runner import Run, run

GENERATES = TASK | {"generate": {"max_new_tokens": 4}, "answer": "text"}
BEFORE = {"evaluation": {"before": True}}
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
HOSTILE = "\x1b]0;title\x07\x1b[2J[red]x[/red]\u202e</td><script>alert(1)</script>\r\n" + "long " * 2000


def test_docstring_examples_pass() -> None:
    assert doctest.testmod(examples).failed == 0


def printed(runs: list[Run], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_examples(console, runs)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_examples_are_spread_over_the_test_split_with_all_answers(causal_config: Any) -> None:
    finished = run(causal_config(task=GENERATES, **BEFORE))
    records = finished.generations.set_index(["round", "row"])
    found = pick_examples([finished], 3)
    rows = sorted(records.loc["test"].index)
    chosen = [rows[len(rows) // 6], rows[len(rows) // 2], rows[5 * len(rows) // 6]]
    assert [example.reference for example in found] == [records.loc["test", row]["references"][0] for row in chosen]
    assert [example.answers for example in found] == [[("after", records.loc["test", r]["answer"])] for r in chosen]
    assert [example.before for example in found] == [records.loc["before", row]["answer"] for row in chosen]
    shown = printed([finished])
    for example in found:
        assert example.prompt in shown
        assert example.prompt.startswith("the color of ")
        assert re.search(rf"^after +{re.escape(example.answers[0][1])} *$", shown, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("prompt", "special"),
    [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ 1\n2<|im_end|>\n<|im_start|>assistant\n", CHATML_TOKENS),
        ("<|im_start|>user\nQ 1\n2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", CHATML_TOKENS),
        (
            "<bos><h>user</h>\n\nold<eot><h>user</h>\n\nQ 1\n2<eot><h>assistant</h>\n\n",
            ["<bos>", "<h>", "</h>", "<eot>"],
        ),
        ("<s>[INST] old[/INST] yes</s>[INST] Q 1\n2[/INST]", ["<s>", "</s>", "[INST]", "[/INST]"]),
        ("<bos><t>user\nQ 1\n2<e>\n<t>model\n", ["<bos>", "<t>", "<e>"]),
    ],
)
def test_of_a_chat_the_last_turn_is_shown_without_special_tokens(prompt: str, special: list[str]) -> None:
    assert last_turn(prompt, special) == "Q 1\n2"


def test_a_plain_prompt_is_shown_whole() -> None:
    assert last_turn("<s>Question: why?\nAnswer:", ["<s>"]) == "Question: why?\nAnswer:"
    assert last_turn("Question: why?", []) == "Question: why?"


def test_the_special_tokens_are_those_of_the_tokenizer(causal_config: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = byte_tokenizer(CHATML)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **shape))
    base.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    source = tmp_path / "chats.jsonl"
    chats = [
        [
            {"role": "user", "content": f"old {i}"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": f"new {i}"},
            {"role": "assistant", "content": "no"},
        ]
        for i in range(20)
    ]
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    task = {"kind": "conversation", "generate": {"max_new_tokens": 3}}
    data = {"source": str(source), "max_length": 96}
    finished = run(causal_config(model={"name": str(tmp_path / "chat")}, task=task, data=data, rounds=1))
    shown = [example.prompt for example in pick_examples([finished], 3)]
    assert len(shown) == 3
    assert all(re.fullmatch(r"(new )?\d+", prompt) for prompt in shown)


def test_a_comparison_shows_the_answers_of_its_best_methods_to_one_prompt(causal_config: Any) -> None:
    ranks = {"allocation": "uniform", "high": 4}
    names = ("fedit", "fedex", "flora", "ffa")
    config = causal_config(rounds=1, task=GENERATES, ranks=ranks, **BEFORE)
    runs = run_comparison(comparison_configs(config, names, 2), False, None)
    shown = printed(runs)
    losses = {one.config.method.name: one.test["loss"] for one in runs if one.config.seed == 0}
    worst = max(losses, key=lambda name: losses[name])
    assert "of the 3 best methods" in shown
    for name in names:
        assert len(re.findall(rf"^{name} ", shown, flags=re.MULTILINE)) == (0 if name == worst else 2)
    assert len(shown.splitlines()) <= 26
    assert [name for name, _ in pick_examples(runs, 5)[0].answers] == list(names)
    plot_scores(runs, config.folder)
    page = write_page(runs, config.folder).read_text()
    assert page.count('class="answers"') == 5
    assert "before training: " in page


def test_answers_cannot_control_the_terminal_or_the_page(causal_config: Any) -> None:
    finished = run(causal_config(task=GENERATES, **BEFORE))
    file = finished.folder.generations_file
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        record |= {"answer": HOSTILE, "prompt": HOSTILE + str(record["row"]), "references": [HOSTILE]}
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = printed([finished])
    assert all(line.isprintable() for line in shown.splitlines())
    assert "[red]x[/red]" in shown
    assert len(shown.splitlines()) <= 26
    plot_scores([finished], finished.folder.path)
    page = write_page([finished], finished.folder.path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert not set("\x1b\x07\u202e\r") & set(page)
    assert len(page) < 500_000


def test_scores_that_were_asked_for_are_columns_of_the_table_with_their_spread(causal_config: Any) -> None:
    task = GENERATES | {"scores": ["bleu"], "generate": {"max_new_tokens": 4, "limit": 4}}
    config = causal_config(rounds=1, task=task)
    runs = run_comparison(comparison_configs(config, ("fedex",), 2), False, None)
    (row,) = summarize(runs, 1.0)
    assert set(row.more) == {"bleu", "exact"}
    for name, (score, spread) in row.more.items():
        values = [one.test[name] for one in runs]
        assert (score, spread) == (mean(values), stdev(values))
    metric = METRICS["loss"]
    assert columns(metric, 1.0, more_metrics(runs))[1:4] == ["test loss", "test BLEU, %", "test exact answers, %"]
    assert cells(metric, row)[3] == f"{100 * row.more['exact'][0]:.2f} ± {100 * row.more['exact'][1]:.2f}"
    plot_scores(runs, config.folder)
    assert "<th>test BLEU, %</th><th>test exact answers, %</th>" in write_page(runs, config.folder).read_text()


def test_a_run_that_generates_nothing_shows_no_answers(tiny_config: Any) -> None:
    finished = run(tiny_config(rounds=1))
    assert printed([finished]) == ""
    plot_scores([finished], finished.folder.path)
    assert 'class="answers"' not in write_page([finished], finished.folder.path).read_text()


def test_the_report_of_a_finished_run_shows_the_same_answers(
    causal_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = run(causal_config(task=GENERATES, **BEFORE))
    assert command("report", str(finished.folder.path)) == 0
    assert "answers to some prompts of the test split; generations.jsonl has all of them" in capsys.readouterr().out


def test_answers_of_clients_have_their_names(causal_config: Any) -> None:
    finished = run(causal_config(method="fedsa", rounds=1, task=GENERATES))
    assert pick_examples([finished], 1)[0].answers[0][0] == "after, client-000"
    assert isinstance(finished.folder.generations, Generations)
