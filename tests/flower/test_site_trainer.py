"""What a site answers to any message, and that nothing of its rows, labels or paths is in an answer."""

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("flwr.serverapp")

from fedelta.errors import FedeltaError
from fedelta.federation.server import Server, ServerState
from fedelta.flower.agreement import shared_settings
from fedelta.flower.server.farewell import read_farewell
from fedelta.flower.site.site_trainer import SiteTrainer
from fedelta.learning.device import DeviceError
from fedelta.learning.model.base_model import load_base
from fedelta.lora.adapter import LoraPair
from fedelta.lora.lowrank import LowRank
from fedelta.protocol.failures import FAILURE, INTERRUPTIONS, REFUSALS, SETTING, failure_facts, failure_words
from fedelta.protocol.farewell import Farewell
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import pack, unpack
from fedelta.runs.assemble import make_server
from fedelta.runs.export import export_state

CANARIES = ("quokkarow", "quokkapath", "quokkalabel", "quokkaenvironment")
CLASSES = ["city", "mountain", "sea"]


class Site:
    """A site with its own rows in a folder, and the server's view of it. Every answer is recorded."""

    def __init__(self, config: Any, folder: Path, rows: str) -> None:
        folder.mkdir(parents=True)
        (folder / "quokkapath.csv").write_text(rows)
        self.config = config
        self.trainer = SiteTrainer(
            config, str(folder / "quokkapath.csv"), 4, "a", folder / "identity.json", folder / "kept"
        )
        self.sent: list[bytes] = []

    def ask(self, kind: str, blob: bytes) -> dict[str, Any]:
        facts, update = self.trainer.handle({"kind": kind}, blob)
        self.sent.append(json.dumps(facts).encode() + update)
        self.update = update
        return facts

    def introduce(self, **changes: Any) -> dict[str, Any]:
        question = {"settings": shared_settings(self.config), "classes": CLASSES, "run": "1", "client": "a", **changes}
        return self.ask("query", json.dumps(question).encode())

    def broadcast(self) -> tuple[Server, ServerState, Broadcast]:
        server, model = make_server(self.config), self.trainer.trainer.model
        state = server.start(model.shapes, model.head_tensors(), ["a"], CLASSES)
        return server, state, server.broadcast(state, "a")

    def check_nothing_leaked(self) -> None:
        for answer in self.sent:
            assert not any(canary.encode() in answer for canary in CANARIES)


def rows(label: str = "sea", count: int = 12) -> str:
    return "text,label,author\n" + "".join(f"quokkarow {i} of the {label},{label},me\n" for i in range(count))


@pytest.fixture
def make_site(tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SECRET", "quokkaenvironment")

    def make(text: str = "", **changes: Any) -> Site:
        config = tiny_config(method="fedex", ranks={"high": 2}, **changes)
        return Site(config, tmp_path / "quokkapath", text or rows())

    return make


def test_every_error_becomes_a_fixed_word_and_its_text_stays_in_the_log(
    make_site: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site()
    assert site.introduce()["rows"] > 0
    _, _, sent = site.broadcast()
    capsys.readouterr()
    errors: list[tuple[Exception, str]] = [
        (FedeltaError("row 3 holds 'quokkarow'"), "input"),
        (DeviceError("out of memory in quokkapath"), "device"),
        (MemoryError("quokkapath"), "device"),
        (KeyError("quokkalabel"), "program"),
        (OSError(28, "No space left on device", "/home/quokkapath/kept"), "program"),
        (RuntimeError("quokkaenvironment " * 10_000), "program"),
    ]
    for error, kind in errors:

        def fail(*_: Any, error: Exception = error) -> Any:
            raise error

        site.trainer.trainer.reply = fail
        assert site.ask("train", sent.to_bytes()) == {FAILURE: kind}
        line = capsys.readouterr().out.strip()
        assert "did not train: " in line
        assert "quokka" in line
        assert "\n" not in line
        assert len(line) < 400
    site.check_nothing_leaked()


def test_a_site_that_cannot_take_part_tells_its_server_the_kind_alone(make_site: Any) -> None:
    site = make_site(rows("quokkalabel"))
    assert site.introduce() == {FAILURE: "rows"}
    assert site.introduce(settings={"training.steps": 9}) == {FAILURE: "settings", SETTING: "training.steps"}
    assert site.introduce(settings={"data.label": "quokka"})[FAILURE] == "settings"
    site.trainer.name = None
    assert site.introduce(client="../quokka") == {FAILURE: "name"}
    assert site.ask("train", b"") == {FAILURE: "broadcast"}
    for blob in (b"", b"not json", b"[" * 100_000, b"[]", b"{}", b'{"settings": 3}'):
        assert site.ask("query", blob)[FAILURE] in {*REFUSALS, *INTERRUPTIONS}
    site.check_nothing_leaked()


def test_the_server_has_words_for_every_kind_and_quotes_nothing_else() -> None:
    for kind in (*REFUSALS, *INTERRUPTIONS):
        assert failure_words({FAILURE: kind}).endswith("its own log says why")
    asked = {"training.steps": 2}
    words = failure_words({FAILURE: "settings", SETTING: "training.steps"}, asked)
    assert words.startswith("its training.steps is not the server's")
    for facts in ({FAILURE: "settings", SETTING: "\x1b[2J"}, {FAILURE: "\x1b[2J"}, {FAILURE: ["x"]}, {FAILURE: None}):
        assert "\x1b" not in failure_words(facts, asked)
    assert failure_facts(ValueError("quokkarow")) == {FAILURE: "program"}


def mutations(blob: bytes, number: int) -> list[bytes]:
    """Damage a message: its bytes, its JSON facts, its tensors."""
    rng = random.Random(0)
    damaged = [b"", blob[:7], blob[: len(blob) // 2], blob + b"x", b"\xff" * 64]
    deep = json.dumps({"__metadata__": {"fedelta": "[" * 100_000}}).encode()
    damaged += [struct.pack("<Q", len(deep)) + deep, struct.pack("<Q", 200_000) + b"[" * 200_000]
    tensors, facts = unpack(blob)
    values: list[Any] = [None, -1, 10**30, "x", "\x1b[31m", [], {}, True, 1.5, ["x"] * 3, {"x": {"x": []}}]
    places = [(facts, key) for key in facts]
    places += [(each, key) for each in facts.values() if isinstance(each, dict) for key in each]
    for holder, key in places:
        before = holder[key]
        for value in values:
            if value != before:
                holder[key] = value
                damaged.append(pack(tensors, facts))
        del holder[key]
        damaged.append(pack(tensors, facts))
        holder[key] = before
    for name, tensor in tensors.items():
        for other in (tensor[..., :-1], tensor.double(), tensor.to(torch.int8), tensor.reshape(-1), tensor[None]):
            damaged.append(pack({**tensors, name: other}, facts))
        damaged.append(pack({key: each for key, each in tensors.items() if key != name}, facts))
        damaged.append(pack({**tensors, "patch/1/\x1b[31m": tensor}, facts))
    while len(damaged) < number:
        flipped = bytearray(blob)
        flipped[rng.randrange(len(blob) if rng.random() < 0.2 else min(2000, len(blob)))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    return damaged


def test_a_malformed_broadcast_is_one_line_and_the_site_goes_on_training(
    make_site: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site(federation={"precision": "int8"})
    site.introduce()
    server, state, _ = site.broadcast()
    module = next(iter(state.log.shapes))
    m, n = state.log.shapes[module]
    log = state.log.append({module: LowRank(torch.ones(m, 1), torch.ones(1, n))})
    sent = server.broadcast(replace(state, log=log), "a")
    trainer = site.trainer.trainer
    trained, whole = trainer.reply, []

    def reply(blob: bytes, shard: Any) -> bytes:
        # Read and check every broadcast, but train on few of them.
        task = trainer._task(blob, shard)
        whole.append(task)
        return b""

    trainer.reply = reply
    capsys.readouterr()
    for blob in mutations(sent.to_bytes(), 400):
        facts = site.ask("train", blob)
        if facts:
            assert facts[FAILURE] in ("broadcast", "input")
            line = capsys.readouterr().out.strip()
            assert "\n" not in line
            assert len(line) < 400
            assert line.isprintable()
            if not whole:
                assert trainer.base.version == 0
    trainer.base.__init__()
    trainer.reply = trained
    for heads in ({}, {"other": torch.ones(3)}, {name: tensor[:1] for name, tensor in sent.heads.items()}):
        assert site.ask("train", replace(sent, heads=heads).to_bytes())[FAILURE] in {*REFUSALS, *INTERRUPTIONS}
    assert site.ask("train", sent.to_bytes()) == {}
    assert ClientUpdate.from_bytes(site.update, "a").version == 1
    site.check_nothing_leaked()


def test_a_rank_that_the_site_cannot_afford_is_refused(make_site: Any) -> None:
    site = make_site()
    site.introduce()
    _, _, sent = site.broadcast()
    assert site.ask("train", replace(sent, rank=10**9).to_bytes()) == {FAILURE: "broadcast"}


def test_what_a_site_sends_in_a_round_holds_no_row_label_or_path(make_site: Any) -> None:
    site = make_site(task={"kind": "classification"})
    introduction = site.introduce()
    assert set(introduction) == {"clients", "version", "base", "rank", "rows"}
    _, _, sent = site.broadcast()
    assert site.ask("train", sent.to_bytes()) == {}
    _, facts = unpack(site.update)
    assert facts["metrics"].keys() <= {"train_loss", "validation_loss"}
    site.check_nothing_leaked()


def test_the_last_message_ends_the_site_and_leaves_an_adapter_that_peft_loads(
    make_site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site()
    site.introduce()
    server, state, _ = site.broadcast()
    pair = next(iter(state.method.adapter))
    changed = state.method.adapter.map(lambda p: LoraPair(p.A, p.B + 1))
    state = replace(state, method=replace(state.method, adapter=changed))
    written = tmp_path / "run" / "adapter"
    export_state(written, server, state, {}, site.trainer.trainer.model)
    sent = read_farewell(written, 3).to_bytes()
    assert str(tmp_path).encode() not in sent
    assert site.ask("query", sent) == {"clients": ["a"]}
    assert site.trainer.finished
    line = capsys.readouterr().out.splitlines()[-1]
    folder = tmp_path / "quokkapath" / "adapter"
    assert line == f"the run has ended after 3 rounds; its adapter is in {folder}"
    assert (folder / "adapter_model.safetensors").read_bytes() == (written / "adapter_model.safetensors").read_bytes()
    base = load_base(site.config.model, len(CLASSES), site.trainer.tokenizer, 0, site.config.task.model_kind)
    loaded = peft.PeftModel.from_pretrained(base, str(folder))
    (B,) = [p for name, p in loaded.named_parameters() if f"{pair}.lora_B" in name]
    assert torch.allclose(B, torch.tensor(1 / server.scale(2)))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == site.config.model.name
    site.check_nothing_leaked()


def test_a_last_message_that_is_damaged_or_without_adapter_does_not_write_one(make_site: Any, tmp_path: Path) -> None:
    site = make_site()
    for blob in (b"\0" * 8, Farewell(3, {"x": 1}, b"no tensors").to_bytes(), pack({}, {"rounds": 1})):
        assert site.ask("query", blob) == {FAILURE: "broadcast"}
        assert not site.trainer.finished
    assert site.ask("query", Farewell(3).to_bytes()) == {"clients": []}
    assert site.trainer.finished
    assert not (tmp_path / "quokkapath" / "adapter").exists()
