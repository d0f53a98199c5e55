"""`fedelta generate` writes what plain transformers and PEFT write with the same adapter."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedelta
from causal import TASK
from chats import CHATML, byte_tokenizer
from command import fedelta as command
from command import refusal
from fedelta.cli import chat
from fedelta.errors import FedeltaError
from fedelta.runs.generate import Decoding, Writer
from fedelta.runs.result_model import load_result
from fedelta.runs.runner import Run, run

GENERATES = TASK | {"generate": {"max_new_tokens": 5}, "answer": "text"}
ROWS = [{"article": "a", "thing": "ship"}, {"article": "an old", "thing": "moon"}, {"article": "", "thing": "hill"}]
PROMPTS = ["the color of a ship is :", "the color of an old moon is :", "the color of  hill is :"]
LEARNS = {"rounds": 3, "training": {"batch_size": 8, "learning_rate": 0.02, "epochs": 2}}


@pytest.fixture
def finished(causal_config: Any) -> Run:
    return run(causal_config(task=GENERATES, **LEARNS))


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A small Llama with a tokenizer of bytes and a chat template."""
    from transformers import LlamaConfig

    tokenizer = byte_tokenizer(CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path / "chat-model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_run(chat_model: Path, causal_config: Any) -> Run:
    task = TASK | {"prompt": "color of {thing}?", "completion": "{answer}", "generate": {"max_new_tokens": 6}}
    return run(
        causal_config(
            model={"name": str(chat_model)}, task=task, data=causal_config().data.model_dump() | {"max_length": 64}
        )
    )


def plain_answers(folder: Path, prompts: list[str], new: int = 5, **options: Any) -> list[str]:
    """What transformers and PEFT alone write, one prompt at a time."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(fields["base_model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", **options)
        tokens = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def test_answers_equal_those_of_plain_transformers_and_peft(finished: Run) -> None:
    assert finished.result["adapter_rank"] > 4, "the adapter includes the patches of the base"
    expected = plain_answers(finished.adapter, PROMPTS)
    assert fedelta.generate(finished, PROMPTS) == expected
    assert fedelta.generate(finished.folder.path, ROWS) == expected
    assert fedelta.generate(str(finished.adapter), ROWS) == expected
    assert fedelta.generate(finished, PROMPTS[0], max_new_tokens=1) == [expected[0].split()[0]]


def test_prompts_of_the_test_split_have_the_answers_that_the_run_has_kept(finished: Run) -> None:
    kept = finished.generations
    kept = kept[kept["round"] == "test"]
    prompts = [prompt.removeprefix("<s> ") for prompt in kept["prompt"]]
    assert fedelta.generate(finished, prompts) == list(kept["answer"])


def test_an_exported_adapter_and_a_cut_copy_without_the_run_work_alone(finished: Run, tmp_path: Path) -> None:
    expected = fedelta.generate(finished, PROMPTS)
    fedelta.export(finished, adapter=tmp_path / "exported")
    shutil.move(finished.folder.path, tmp_path / "gone")
    assert fedelta.generate(tmp_path / "exported", ROWS) == expected
    (tmp_path / "exported" / "task.json").unlink()
    assert fedelta.generate(tmp_path / "exported", PROMPTS, max_new_tokens=5) == expected
    with pytest.raises(FedeltaError, match="no template of prompts is known"):
        fedelta.generate(tmp_path / "exported", ROWS)


def test_a_sample_depends_on_the_seed_and_not_on_the_other_prompts(finished: Run) -> None:
    def draw(prompts: list[str], seed: int) -> list[str]:
        return fedelta.generate(finished, prompts, sample=True, temperature=3.0, max_new_tokens=12, seed=seed)

    assert draw(PROMPTS, 1) == draw(PROMPTS, 1)
    assert draw(PROMPTS, 1) != draw(PROMPTS, 2)
    assert draw(PROMPTS[:1], 1) == draw(PROMPTS, 1)[:1]
    assert draw(PROMPTS[:1] * 2, 1)[0] != draw(PROMPTS[:1] * 2, 1)[1]


def test_the_command_prints_answers_and_writes_them(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = plain_answers(finished.adapter, PROMPTS)
    place = str(finished.folder.path)
    assert command("generate", place, "--column", "thing=ship", "--column", "article=a") == 0
    assert capsys.readouterr().out == expected[0] + "\n"
    assert command("generate", place, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"> {PROMPTS[0]}\n{expected[0]}\n\n> {PROMPTS[1]}\n{expected[1]}\n"
    assert "prompts are used as they are; the run's are 'the color of {article} {thing} is :'" in printed.err
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    output = tmp_path / "answers.jsonl"
    assert command("generate", place, "--file", str(file), "-o", str(output)) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["answer"] for row in rows] == expected
    assert [row["prompt"] for row in rows] == PROMPTS
    assert rows[1]["thing"] == "moon"
    capsys.readouterr()
    assert refusal(capsys, "generate", place, "--file", str(file), "-o", str(output)).endswith(
        "already exists; --overwrite replaces it"
    )
    assert command("generate", place, "--file", str(file), "-o", str(output), "--overwrite") == 0
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join(PROMPTS) + "\n")
    capsys.readouterr()
    assert command("generate", place, "--file", str(text)) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line and line[0] != ">"] == expected


def test_a_template_is_filled_although_a_column_is_called_prompt(
    causal_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.jsonl"
    things = [("a", "ship", "blue"), ("an", "moon", "gray"), ("the", "hill", "green")] * 8
    words.write_text("".join(json.dumps({"prompt": a, "thing": b, "color": c}) + "\n" for a, b, c in things))
    task = {"prompt": "the color of {prompt} {thing} is :", "completion": " {color}", "generate": {"max_new_tokens": 5}}
    config = causal_config(task=task | {"kind": "completion"}, data={"source": str(words), "max_length": 32}, rounds=1)
    trained = run(config)
    place, bare, file = str(trained.folder.path), tmp_path / "bare.txt", tmp_path / "rows.jsonl"
    filled, alone = plain_answers(trained.adapter, ["the color of a ship is :", "a ship"])
    assert command("generate", place, "--column", "prompt=a", "--column", "thing=ship") == 0
    printed = capsys.readouterr()
    assert printed.out == filled + "\n"
    assert "used as they are" not in printed.err
    assert fedelta.generate(trained, [{"prompt": "a", "thing": "ship"}, "a ship"]) == [filled, alone]
    bare.write_text("a ship\n")
    assert command("generate", place, "--file", str(bare)) == 0
    assert capsys.readouterr().out == alone + "\n"
    file.write_text('{"prompt": "a", "thing": "ship"}\n{"prompt": "a ship"}\n')
    output = tmp_path / "out.jsonl"
    assert command("generate", place, "--file", str(file), "-o", str(output)) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"prompt": "a", "thing": "ship", "answer": filled},
        {"prompt": "a ship", "answer": alone},
    ]
    capsys.readouterr()
    assert "but thing is missing" in refusal(capsys, "generate", place, "--column", "prompt=a")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"thing": ["x"], "article": "a"}, "line 2: column thing is a list, expected text or a number"),
        ({"thing": {"a": 1}, "article": "a"}, "line 2: column thing is a dict, expected text or a number"),
        ({"thing": " ", "article": None}, "line 2: no text in the columns article, thing"),
        ({"thing": "a \ud800", "article": "a"}, "is not valid Unicode"),
        ({"prompt": ["x"]}, "line 2: prompt is a list, expected text"),
        ({"prompt": " "}, "line 2: an empty prompt"),
        ({"prompt": "x", "answer": "REF"}, "line 2: it has a key 'answer' already"),
    ],
)
def test_a_row_that_cannot_be_a_prompt_is_refused_with_its_line_before_the_model_is_loaded(
    row: dict[str, Any], expected: str, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    line = refusal(
        capsys, "generate", str(finished.folder.path), "--file", str(file), "-o", str(output), "--base", "/gone"
    )
    assert expected in line
    assert not output.exists()


def test_bytes_that_are_no_text_are_refused_on_standard_input(finished: Run) -> None:
    environment = os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "fedelta.cli", "generate", str(finished.folder.path)]
    done = subprocess.run(arguments, input=b"hi \xff\n", capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().strip().endswith("standard input: character 4 is not valid Unicode")


def test_a_prompt_may_come_from_standard_input(
    finished: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[0] + "\n"))
    assert command("generate", str(finished.folder.path)) == 0
    assert capsys.readouterr().out == plain_answers(finished.adapter, PROMPTS[:1])[0] + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert "standard input is empty" in refusal(capsys, "generate", str(finished.folder.path))


def test_a_chat_model_answers_a_users_turn(chat_run: Run) -> None:
    asked = "<turn>user\ncolor of ship?<end>\n<turn>assistant\n"
    expected = plain_answers(chat_run.adapter, [asked], 6, add_special_tokens=False)
    assert fedelta.generate(chat_run, ["color of ship?"]) == expected
    assert fedelta.generate(chat_run, [{"thing": "ship"}]) == expected
    system = "<turn>system\nbe brief<end>\n" + asked
    expected = plain_answers(chat_run.adapter, [system], 6, add_special_tokens=False)
    assert fedelta.generate(chat_run, ["color of ship?"], system="be brief") == expected
    # Without a chat, the prompt is completed as a plain text.
    plain = plain_answers(chat_run.adapter, ["color of ship?"], 6)
    assert fedelta.generate(chat_run, ["color of ship?"], chat=False) == plain


def test_each_turn_of_a_chat_sees_all_turns_before_it(chat_run: Run) -> None:
    writer = Writer(load_result(chat_run.folder.path, "generate"), Decoding(max_new_tokens=6), chat=True)
    shown: list[str] = []
    messages = chat.converse(writer, ["one", "", "two"], shown.append)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    text = f"<turn>user\none<end>\n<turn>assistant\n{messages[1]['content']}<end>\n<turn>user\ntwo<end>\n"
    assert [messages[1]["content"], messages[3]["content"]] == plain_answers(
        chat_run.adapter,
        ["<turn>user\none<end>\n<turn>assistant\n", text + "<turn>assistant\n"],
        6,
        add_special_tokens=False,
    )
    assert chat.converse(writer, ["one", "/new", "two"], shown.append)[0]["content"] == "two"
    # A turn that is too long is refused, and the chat continues.
    assert len(chat.converse(writer, ["one", "x" * 400, "two"], shown.append)) == 4


def test_commands_of_a_chat_do_not_go_to_the_model(chat_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(load_result(chat_run.folder.path, "generate"), Decoding())
    turns = iter(["/help", "/system be brief", "hi", "/etc/hosts?", "quit", "more"])
    messages = chat.converse(writer, turns, io.StringIO().write)
    assert [message["content"] for message in messages if message["role"] == "user"] == ["hi", "/etc/hosts?"]
    assert list(turns) == ["more"]
    printed = capsys.readouterr().err
    assert "/help is not a command; /new starts another chat, /exit ends it" in printed
    assert "/system is not a command" in printed


def test_answers_that_reach_the_limit_are_counted(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    place, limits = str(finished.folder.path), []
    for limit in (1, 40):
        arguments = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-new-tokens", str(limit)]
        assert command("generate", place, *arguments) == 0
        limits.append(f"2 of 2 answers were cut at {limit} token" in capsys.readouterr().err)
    assert limits == [True, False]


def test_a_chat_on_a_terminal_reads_turns_and_shows_answers(chat_run: Run) -> None:
    expected = fedelta.generate(chat_run, ["color of ship?"])
    ours, theirs = pty.openpty()
    arguments = ["generate", str(chat_run.folder.path), "--chat"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedelta.cli", *arguments], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs
    )
    os.write(ours, b"color of ship?\n")
    os.write(ours, b"\x04")
    out, _ = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    shown = chat.safe_lines(out.decode())
    assert chat.safe_lines(expected[0]).strip() in shown


def test_what_an_answer_holds_cannot_control_the_terminal(
    finished: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J[red]x[/red] \u202eback"
    monkeypatch.setattr(Writer, "_text", lambda *_: hostile)
    assert command("generate", str(finished.folder.path), "--prompt", PROMPTS[0]) == 0
    shown = capsys.readouterr().out.removesuffix("\n")
    assert shown.isprintable()
    assert "[red]x[/red]" in shown
    pieces: list[str] = []
    screen = chat.Screen(load_result(finished.adapter, "generate").tokenizer, pieces.append)
    screen.on_finalized_text(hostile, stream_end=True)
    assert "".join(pieces).removesuffix("\n").isprintable()


def test_a_method_without_a_global_model_needs_the_name_of_a_client(
    causal_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = run(causal_config(method="fedsa", task=GENERATES))
    place = str(finished.folder.path)
    line = refusal(capsys, "generate", place, "--prompt", PROMPTS[0])
    assert "one adapter for each client; choose one with --client: client-000, client-001" in line
    assert "no client 'x', found client-000" in refusal(capsys, "generate", place, "--prompt", "a", "--client", "x")
    expected = [plain_personal(finished, client) for client in ("client-000", "client-002")]
    found = [fedelta.generate(finished, PROMPTS[0], client=c)[0] for c in ("client-000", "client-002")]
    assert found == expected
    assert fedelta.generate(finished.adapter / "client-002", PROMPTS[0])[0] == expected[1]


def plain_personal(finished: Run, client: str) -> str:
    folder = finished.adapter / client
    base = AutoModelForCausalLM.from_pretrained(finished.config.model.name)
    tokenizer = AutoTokenizer.from_pretrained(finished.config.model.name)
    model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_adapter_names_its_base_so_that_plain_peft_finds_it_from_any_folder(
    causal_config: Any, causal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(causal("llama").parent)
    finished = run(causal_config(rounds=1, model={"name": f"./{causal('llama').name}"}))
    folder = finished.adapter.absolute()
    monkeypatch.chdir(tmp_path)
    assert peft.AutoPeftModelForCausalLM.from_pretrained(folder) is not None
    assert fedelta.generate(folder, PROMPTS[:1], max_new_tokens=3) == plain_answers(folder, PROMPTS[:1], 3)


def test_a_base_that_has_moved_is_named_with_an_option(finished: Run, causal: Any, tmp_path: Path) -> None:
    expected = fedelta.generate(finished, PROMPTS)
    shutil.copytree(finished.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(FedeltaError, match=r"base model /nowhere/base: no such folder; .* name its folder with --base"):
        fedelta.generate(tmp_path / "adapter", PROMPTS)
    assert fedelta.generate(tmp_path / "adapter", PROMPTS, base=causal("llama")) == expected
    with pytest.raises(FedeltaError, match="does not fit the base model"):
        fedelta.generate(tmp_path / "adapter", PROMPTS, base=causal("gpt2"))


def test_an_adapter_that_lacks_layers_is_refused(finished: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(finished.adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(FedeltaError, match="does not fit the base model .*missing adapter keys"):
        fedelta.generate(folder, PROMPTS)


def test_mistakes_are_one_line(
    finished: Run, tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, empty = str(finished.folder.path), tmp_path / "empty"
    empty.mkdir()
    assert "no adapter_config.json" in refusal(capsys, "generate", str(empty), "--prompt", "a")
    assert "no such folder" in refusal(capsys, "generate", str(tmp_path / "none"), "--prompt", "a")
    assert "holds several runs" in refusal(capsys, "generate", str(finished.folder.path.parent), "--prompt", "a")
    classifier = run(tiny_config(rounds=1))
    line = refusal(capsys, "generate", str(classifier.folder.path), "--prompt", "a")
    assert "a classification model does not write texts; use `fedelta predict`" in line
    line = refusal(capsys, "generate", str(classifier.adapter), "--prompt", "a")
    assert "use `fedelta predict`" in line
    assert "expected name=value" in refusal(capsys, "generate", place, "--column", "thing")
    assert "need the columns article, thing, but article is missing" in refusal(
        capsys, "generate", place, "--column", "thing=ship"
    )
    assert "expected one of them" in refusal(capsys, "generate", place, "--prompt", "a", "--column", "thing=ship")
    assert "an empty prompt" in refusal(capsys, "generate", place, "--prompt", " ")
    assert "more than the 64 tokens that the model takes" in refusal(capsys, "generate", place, "--prompt", "a " * 70)
    assert "needs a chat template" in refusal(capsys, "generate", place, "--prompt", "a", "--chat")
    assert "--system is for chats" in refusal(capsys, "generate", place, "--prompt", "a", "--system", "b")
    assert "for sampling: add --sample" in refusal(capsys, "generate", place, "--prompt", "a", "--top-p", "0.5")
    assert "expected a number of at least 0.001" in refusal(
        capsys, "generate", place, "--prompt", "a", "--sample", "--temperature", "1e-300"
    )
    assert "--column thing is given twice" in refusal(
        capsys, "generate", place, "--column", "thing=ship", "--column", "thing=moon"
    )
    assert "prompt 2: character 3 is not valid Unicode" in refusal(
        capsys, "generate", place, "--prompt", "a", "--prompt", "a \udcff"
    )
    assert "ends in .jsonl" in refusal(capsys, "generate", place, "--prompt", "a", "-o", "x.csv")
    (tmp_path / "none.txt").write_text("\n")
    assert "the file is empty" in refusal(capsys, "generate", place, "--file", str(tmp_path / "none.txt"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n["b"]\n')
    assert "line 2: found a list" in refusal(capsys, "generate", place, "--file", str(tmp_path / "bad.jsonl"))
    assert "--client x: this result has one adapter for all clients" in refusal(
        capsys, "generate", place, "--prompt", "a", "--client", "x"
    )
    finished.folder.result_file.unlink()
    assert "this run has not finished" in refusal(capsys, "generate", place, "--prompt", "a")


def test_a_conversation_run_answers_chats_with_the_system_turn_of_its_training(
    chat_model: Path, causal_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"color of {i}?"}, {"role": "assistant", "content": "red"}]}
        for i in range(24)
    ]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in chats))
    task = {"kind": "conversation", "system": "be brief", "generate": {"max_new_tokens": 6}}
    data = {"source": str(source), "max_length": 96}
    chat_run = run(causal_config(model={"name": str(chat_model)}, task=task, data=data, rounds=1))
    user, end = "<turn>user\ncolor of ship?<end>\n", "<turn>assistant\n"
    system = "<turn>system\nbe brief<end>\n"
    later = "<turn>assistant\nred<end>\n<turn>user\nwhy?<end>\n"
    prompts = [system + user + end, user + end, system + user + later + end, "<turn>system\nx<end>\n" + user + end]
    expected = plain_answers(chat_run.adapter, prompts, 6, add_special_tokens=False)
    asked = {"role": "user", "content": "color of ship?"}
    assert fedelta.generate(chat_run, ["color of ship?"]) == expected[:1]
    assert fedelta.generate(chat_run, ["color of ship?"], system="") == expected[1:2]
    turns = [asked, {"role": "assistant", "content": "red"}, {"role": "user", "content": "why?"}]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "x"}, asked]}]
    assert fedelta.generate(chat_run.adapter, rows) == expected[2:]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = str(chat_run.folder.path)
    assert command("generate", place, "--file", str(file), "-o", str(output)) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [row | {"answer": answer} for row, answer in zip(rows, expected[2:], strict=True)]
    file.write_text(json.dumps({"messages": turns[:2]}) + "\n")
    capsys.readouterr()
    assert "line 1: the last turn is of the assistant, expected one of the user" in refusal(
        capsys, "generate", place, "--file", str(file)
    )
