"""The rooms of the house: lower ones import nothing above them, and no file outgrows one idea."""

import ast
from pathlib import Path

import fedelta

ROOT = Path(fedelta.__file__).parent
FLOORS = [
    ["errors", "settings", "seeds", "atomic", "stopwatch", "machine", "tensor_file", "__init__"],
    ["gram", "lowrank", "product_sum", "adapter"],
    [
        "quantisation",
        "patch_log",
        "packing",
        "messages",
        "contribution",
        "rank_moments",
        "methods",
        "ranks",
        "deviation",
        "intake",
    ],
    (
        "device data class_token base_model base_patch dropout model prefix metrics training tasks corpus harness "
        "peft_io peft_write"
    ).split(),
    [
        "vllm",
        "peft_folders",
        "aggregate",
        "federation",
        "server",
        "client",
        "checkpoint",
        "export",
        "engines",
        "tracking",
    ],
    "config runner run_export comparison flower sweep report progress terminal cli_sites cli_sweep cli".split(),
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def test_lower_floors_import_nothing_above_them() -> None:
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).parts
        # Flower's processes start whole runs: they are at home where the runner is.
        room = "flower" if "flower" in parts else parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedelta."):
                other = node.module.split(".")[1]
                assert FLOOR[other] <= FLOOR[room], f"{file.name} (floor {FLOOR[room]}) imports {node.module}"


def test_files_are_one_idea_long() -> None:
    for file in ROOT.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 300, file.name


def test_only_the_flower_engine_imports_flower() -> None:
    for file in ROOT.rglob("*.py"):
        if "flower" not in file.parts:
            names = [
                alias.name if isinstance(node, ast.Import) else node.module or ""
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            ]
            assert not any(name.split(".")[0] == "flwr" for name in names), file
