"""The command `fedelta generate`."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fedelta.cli.printing import print_path, print_text
from fedelta.cli.results import Base, Client, Device, DeviceName, Dtype, Place, dtype_name, say_loading
from fedelta.cli.terminal import err, out
from fedelta.errors import FedeltaError, quantity

if TYPE_CHECKING:
    from fedelta.runs.prompts import Prompt, Question

MAX_PROMPT = 160
"""Maximum number of characters of a prompt above its answer."""
PROMPT_COLUMN = "prompt"


Prompts = Annotated[list[str] | None, typer.Option(help="A whole prompt; may be repeated.")]
Columns = Annotated[
    list[str] | None, typer.Option(help="name=value of a column that the run's prompts have; once for each column.")
]
File = Annotated[
    Path | None,
    typer.Option(
        help="Prompts: a .txt with one a line, or a .jsonl with `prompt`, `messages` or the prompts' columns."
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write prompts and answers as JSONL.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Make each prompt a user's turn; without prompts, chat on the terminal.")
]
System = Annotated[str | None, typer.Option(help="Text of a system turn, for chats; default: that of the run.")]
NewTokens = Annotated[
    int | None, typer.Option(help="Maximum number of tokens in an answer; default: that of the run, or 256.", min=1)
]
Sample = Annotated[bool, typer.Option("--sample", help="Draw tokens at random.")]
Temperature = Annotated[float, typer.Option(help="Temperature, for --sample.")]
TopP = Annotated[float, typer.Option(help="Share of the probability to draw from, for --sample.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.", min=0)]


def generate(
    result: Place,
    prompt: Prompts = None,
    column: Columns = None,
    file: File = None,
    output: Output = None,
    overwrite: Overwrite = False,
    chat: Chat = False,
    system: System = None,
    max_new_tokens: NewTokens = None,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    client: Client = None,
    base: Base = None,
    device: Device = DeviceName.auto,
    dtype: Dtype = None,
) -> None:
    """Write answers to new prompts with the language model of a run, or with an adapter."""
    interactive = chat and not (prompt or column or file)
    if output is not None:
        _check_output(output, overwrite, interactive)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not text are refused with their prompt.
        sys.stdin.reconfigure(errors="surrogateescape")
    prompts = [] if interactive else _prompts(prompt or [], column or [], file)
    if output is not None:
        _check_columns(prompts)

    from fedelta.runs.generate import Decoding, Writer
    from fedelta.runs.prompts import read_prompts
    from fedelta.runs.result_model import check_result, load_result

    decoding = Decoding(max_new_tokens, sample, temperature, top_p, seed)
    decoding.check()
    # What can be checked without the model is checked before it is loaded, which may take minutes.
    found = check_result(result, "generate", client)
    questions = read_prompts(prompts, found.task, str(result))
    say_loading(base or found.base)
    loaded = load_result(result, "generate", client=client, base=base, device=device, dtype=dtype_name(dtype))
    writer = Writer(loaded, decoding, chat or None, system)
    if interactive:
        from fedelta.cli.chat import chat_on_terminal

        chat_on_terminal(writer)
        return
    _say_template(loaded.task, questions)
    tokens = [writer.question_tokens(question) for question in questions]
    if output is None:
        _print_answers(writer, questions, tokens)
    else:
        _write_answers(writer, questions, tokens, output)
    if writer.cut:
        cut = "the answer was" if len(questions) == 1 else f"{writer.cut} of {quantity(len(questions), 'answer')} were"
        print_text(err, f"{cut} cut at {quantity(writer.limit, 'token')}; --max-new-tokens sets the limit", "note:")


def _check_output(output: Path, overwrite: bool, interactive: bool) -> None:
    from fedelta.runs.output_table import check_output

    if output.suffix.lower() != ".jsonl":
        raise FedeltaError(f"{output}: expected a name that ends in .jsonl")
    if interactive:
        raise FedeltaError("--output is for prompts: add --prompt, --column or --file")
    check_output(output, overwrite)


def _check_columns(prompts: list["Prompt"]) -> None:
    from fedelta.runs.prompts import ANSWER

    for prompt in prompts:
        if ANSWER in prompt.row:
            raise FedeltaError(f"{prompt.place}: it has a key {ANSWER!r} already; rename or remove it")


def _write_answers(writer: Any, questions: list["Question"], tokens: list[list[int]], output: Path) -> None:
    from fedelta.cli.bars import progress_bar
    from fedelta.files import write_file
    from fedelta.runs.prompts import ANSWER

    lines: list[str] = []
    with progress_bar(err, "prompts") as progress:
        for question, answer in zip(questions, writer.answers(tokens), strict=True):
            # A column `prompt` that fills a template stays as it is.
            whole = {} if question.text is None else {PROMPT_COLUMN: question.text}
            line = {**whole, **question.row, ANSWER: answer}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            progress(len(lines), len(questions))
    write_file(output, "".join(lines))
    print_path(out, "answers", f"{output}: {quantity(len(lines), 'answer')}")


def _prompts(prompts: list[str], columns: list[str], file: Path | None) -> list["Prompt"]:
    """The prompts of the command line, of a file, or of standard input."""
    from fedelta.runs.prompts import Prompt

    given = [name for name, value in (("--prompt", prompts), ("--column", columns), ("--file", file)) if value]
    if len(given) > 1:
        raise FedeltaError(f"{' and '.join(given)}: expected one of them")
    if columns:
        return [Prompt("--column", _row(columns), whole=False)]
    if file is not None:
        return list(_read(file))
    if prompts:
        return [Prompt(f"prompt {i}", {PROMPT_COLUMN: text}, whole=True) for i, text in enumerate(prompts, 1)]
    if sys.stdin.isatty():
        raise FedeltaError("generate: no prompt; pass --prompt TEXT, --column NAME=VALUE, --file FILE, or --chat")
    text = sys.stdin.read()
    if not text.strip():
        raise FedeltaError("generate: standard input is empty, expected a prompt")
    return [Prompt("standard input", {PROMPT_COLUMN: text.removesuffix("\n")}, whole=True)]


def _row(columns: list[str]) -> dict[str, str]:
    row: dict[str, str] = {}
    for name, value in map(_pair, columns):
        if name in row:
            raise FedeltaError(f"--column {name[:40]} is given twice, expected each column once")
        row[name] = value
    return row


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise FedeltaError(f"--column {text[:60]!r}: expected name=value, such as question='What is LoRA?'")
    return name, value


def _read(file: Path) -> Iterator["Prompt"]:
    from fedelta.reading import parse_json, read_bytes
    from fedelta.runs.prompts import Prompt

    content = read_bytes(file, 2**28)
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise FedeltaError(f"{file}: expected UTF-8 ({error.reason} at byte {error.start})") from error
    if file.suffix.lower() not in (".txt", ".jsonl"):
        raise FedeltaError(f"{file}: unknown ending, expected .txt with a prompt on each line, or .jsonl")
    if not any(line.strip() for line in lines):
        raise FedeltaError(f"{file}: the file is empty, expected prompts")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        if file.suffix.lower() == ".txt":
            yield Prompt(place, {PROMPT_COLUMN: line.removesuffix("\r")}, whole=True)
            continue
        row = parse_json(line, place)
        if not isinstance(row, dict):
            raise FedeltaError(f"{place}: found a {type(row).__name__}, expected keys and values")
        yield Prompt(place, row)


def _say_template(task: Any, questions: list["Question"]) -> None:
    """Tell once that whole prompts lack the text around the run's columns, which the model has seen in training."""
    template = getattr(task, "prompt", None)
    whole = any(
        question.text is not None and question.text == question.row.get(PROMPT_COLUMN) for question in questions
    )
    if template is not None and template != "{prompt}" and whole:
        print_text(err, f"prompts are used as they are; the run's are {template!r}, which --column fills", "note:")


def _print_answers(writer: Any, questions: list["Question"], tokens: list[list[int]]) -> None:
    """Print the answers: while they are generated on a terminal, else when they are complete."""
    live = sys.stdout.isatty()
    answers = None if live else writer.answers(tokens)
    for number, question in enumerate(questions):
        if len(questions) > 1:
            print_text(out, _shown(question), ">", "bold", limit=MAX_PROMPT)
        if answers is None:
            from fedelta.cli.chat import Screen

            writer.stream(tokens[number], Screen(writer.tokenizer), number)
        else:
            from fedelta.cli.chat import safe_lines

            out.print(Text(safe_lines(next(answers))), highlight=False, soft_wrap=True)
        if number + 1 < len(questions):
            out.print()


def _shown(question: "Question") -> str:
    """A prompt above its answer: itself, or the messages of a chat."""
    return str(question.row["messages"]) if question.text is None else question.text
