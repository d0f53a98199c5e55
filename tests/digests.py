"""Record digests of fedelta's output, and check that a change keeps the output equal, byte for byte.

    python tests/digests.py record FILE      run all cases and write their digests
    python tests/digests.py compare FILE     run all cases again and list differences; exit code 1 if there are any

The script uses only the installed command and builds its own models and data, so files can move inside the package.
Digests are comparable only on the same computer with the same library versions.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).parent.parent
EQUAL_RANKS = {"allocation": "uniform", "high": 3}
MIXED_RANKS = {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5}
EXPERIMENTS = ("rank_heterogeneity/results/rank_heterogeneity", "exact_aggregation/results/understanding")
EXPERIMENTS += ("exact_aggregation/results/when", "exact_aggregation/results/generation")
Digests = dict[str, str]


class Refused(Exception):
    """Raised when a command ends with an exit code other than 0."""


def command(*arguments: object) -> str:
    """Run `fedelta ARGUMENTS` in this process and return its standard output."""
    (script,) = entry_points(group="console_scripts", name="fedelta")
    before, sys.argv = sys.argv, ["fedelta", *map(str, arguments)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            script.load()()
    except SystemExit as end:
        if end.code:
            raise Refused(f"fedelta {' '.join(map(str, arguments))} ended with exit code {end.code}") from None
    finally:
        sys.argv = before
    return printed.getvalue()


def folder_digests(folder: Path, *patterns: str) -> Digests:
    """Return relative file name → digest for each file that matches a pattern."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise RuntimeError(f"{folder} has no files that match {', '.join(patterns)}")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def methods() -> list[tuple[str, bool]]:
    """Return (name, whether the method supports mixed ranks) for each registered method."""
    from fedelta.methods import methods as registry

    return [(name, method.mixed_ranks) for name, method in sorted(registry().items())]


class Recorder:
    """Runs all cases in one folder and computes their digests."""

    def __init__(self, folder: Path) -> None:
        from causal import TASK, build_model, write_rows
        from encoder import build_bert, write_texts

        self.folder = folder
        bert = build_bert(folder / "bert")
        texts = write_texts(folder / "texts.csv")
        llama = build_model("llama", folder / "llama")
        things = write_rows(folder / "things.jsonl")
        self.encoder = {
            "rounds": 3,
            "workers": 1,
            "model": {"name": str(bert)},
            "lora": {"alpha": 8},
            "data": {"source": str(texts), "max_length": 16},
            "partition": {"kind": "natural", "by": "author", "clients": 4},
            "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
        }
        self.language = {
            "rounds": 2,
            "workers": 1,
            "method": "fedex",
            "task": TASK,
            "model": {"name": str(llama)},
            "lora": {"alpha": 8, "target_modules": "all-linear"},
            "ranks": MIXED_RANKS,
            "data": {"source": str(things), "max_length": 32},
            "partition": {"clients": 4},
            "training": {"batch_size": 8, "learning_rate": 0.02},
        }

    def config(self, name: str, base: dict, **changes: object) -> Path:
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(base | changes | {"name": name, "output": str(self.folder / "runs")}))
        return file

    def run(self, name: str, base: dict, *options: str, **changes: object) -> Digests:
        command("run", self.config(name, base, **changes), *options)
        return self.digests(name)

    def digests(self, name: str) -> Digests:
        return folder_digests(self.folder / "runs" / name, "rounds.jsonl", "adapter/**/*")

    def cases(self) -> Iterator[tuple[str, Callable[[], Digests]]]:
        for name, mixed in methods():
            yield f"run/{name}/equal", lambda n=name: self.run(f"{n}-equal", self.encoder, method=n, ranks=EQUAL_RANKS)
            if mixed:
                yield (
                    f"run/{name}/mixed",
                    lambda n=name: self.run(f"{n}-mixed", self.encoder, method=n, ranks=MIXED_RANKS),
                )
        mixed = {"method": "fedex", "ranks": MIXED_RANKS}
        by_loss = {"allocation": "loss", "low": 2, "high": 4, "share": 0.5}
        stack = {"steps": 2, "batch_size": 8, "learning_rate": 0.01, "stack": 3}
        yield "run/workers-2", lambda: self.run("workers-2", self.encoder, **mixed | {"workers": 2})
        yield "run/stacked", lambda: self.run("stacked", self.encoder, **mixed | {"training": stack})
        yield "run/int8", lambda: self.run("int8", self.encoder, **mixed | {"federation": {"precision": "int8"}})
        yield "run/by-loss", lambda: self.run("by-loss", self.encoder, method="replication", ranks=by_loss)
        yield "run/language-model", lambda: self.run("language", self.language)
        yield "run/resumed", self.resumed
        yield "run/flower", lambda: self.run("over-flower", self.encoder, "--engine", "flower", **mixed)
        yield "export", self.export
        yield "compare", self.compare
        yield "aggregate/mean", lambda: self.aggregate("mean")
        yield "aggregate/rank", lambda: self.aggregate("rank", "--rank", "3")
        for name, _ in methods():
            yield f"aggregate/{name}", lambda n=name: self.aggregate(n, "--method", n)
        yield "aggregate/single", lambda: self.aggregate("single", "--method", "fedex", "--single")
        for place in EXPERIMENTS:
            yield f"report/{place.split('/')[-1]}", lambda p=place: self.report(p)

    def resumed(self) -> Digests:
        changes = {"method": "fedex", "ranks": MIXED_RANKS}
        command("run", self.config("resumed", self.encoder, **changes | {"rounds": 1}))
        return self.run("resumed", self.encoder, "--resume", **changes)

    def export(self) -> Digests:
        run, out = self.folder / "runs" / "fedex-mixed", self.folder / "exported"
        command("export", run, "--adapter", out / "adapter", "--merged", out / "merged")
        command("export", run, "--adapter", out / "cut", "--rank", "2")
        # The configuration of a merged model is left out: transformers writes it, with its own version.
        return folder_digests(out, "adapter/*", "cut/*", "merged/*.safetensors")

    def compare(self) -> Digests:
        file = self.config("compared", self.encoder, ranks=MIXED_RANKS)
        command("compare", file, "--methods", "zero-padding,replication", "--seeds", "2")
        return folder_digests(self.folder / "runs" / "compared-compare", "**/rounds.jsonl", "**/adapter/*")

    def aggregate(self, name: str, *options: str) -> Digests:
        """Aggregate adapters once. They have equal ranks, or mixed ranks for the exact mean."""
        ranks = (2, 5, 3) if name in ("mean", "rank") else (3, 3, 3)
        folders = [self.adapter(i, rank) for i, rank in enumerate(ranks)]
        out = self.folder / "aggregated" / name
        try:
            command("aggregate", *folders, "--weights", "1,2,3", "-o", out, *options)
        except Refused:
            # Some methods need more information than adapter folders contain.
            return {"refused": "exit code 2"}
        return folder_digests(out, "**/*")

    def adapter(self, number: int, rank: int) -> Path:
        folder = self.folder / f"site-{number}-rank-{rank}"
        if not folder.exists():
            import peft
            from transformers import AutoModel

            torch.manual_seed(number)
            config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=False)
            peft.get_peft_model(AutoModel.from_pretrained(self.folder / "bert"), config).save_pretrained(folder)
        return folder

    def report(self, place: str) -> Digests:
        (size,) = (ROOT / "experiments" / place).iterdir()
        copy = self.folder / "reports" / place
        shutil.copytree(size, copy)
        command("report", copy)
        return folder_digests(copy, "**/*.md", "**/*.svg", "**/*.tex", "*.parquet")


def record() -> dict[str, Digests]:
    torch.set_num_threads(1)
    digests = {}
    with tempfile.TemporaryDirectory() as folder:
        # Some files contain paths, so the folder must have the same name each time.
        place = Path(folder).parent / "fedelta-digests"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.chdir(place)
        try:
            for name, case in Recorder(place).cases():
                begin = time.perf_counter()
                digests[name] = case()
                print(f"{name}: {len(digests[name])} files, {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        finally:
            os.chdir(ROOT)
            shutil.rmtree(place, ignore_errors=True)
    return digests


def differences(before: dict[str, Digests], now: dict[str, Digests]) -> list[str]:
    lines = []
    for case in sorted({*before, *now}):
        old, new = before.get(case, {}), now.get(case, {})
        for file in sorted({*old, *new}):
            if file not in new or file not in old:
                lines.append(f"{case}: {file} exists only {'before' if file in old else 'now'}")
            elif old[file] != new[file]:
                lines.append(f"{case}: {file} differs")
    return lines


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        sys.exit(__doc__)
    if os.environ.get("PYTHONHASHSEED") != "0":
        # PEFT stores target modules in a set. With random hashes, their order in a file would differ between processes.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    verb, file = sys.argv[1], Path(sys.argv[2]).absolute()
    digests = record()
    if verb == "record":
        file.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
        return
    lines = differences(json.loads(file.read_text()), digests)
    print("\n".join(lines) or "the same")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
