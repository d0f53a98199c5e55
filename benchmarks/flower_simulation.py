"""Benchmark of a run of ten rounds, compared with Flower's simulation on Ray, from the start of Python to its end.

It needs fedelta and flwr in a separate environment:  pip install 'flwr[simulation]>=1.41,<2'

python benchmarks/flower_simulation.py              fp32 and bf16 through `fedelta run`, then Flower in fp32
python benchmarks/flower_simulation.py --write      write the table to benchmarks/README.md

Flower's clients follow its users' usual code: one PEFT model per process, LoRA and head as arrays, plain FedAvg,
batches padded to their longest text, one client per core, and server-side evaluation on unsorted validation texts.
"""

import argparse
import functools
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).with_name("ag_news.yaml")
# Equal ranks, because FedAvg can't average others.
SAME = ["ranks.allocation=fixed", "ranks.low=8", "ranks.high=8", "method=fedit", "rounds=10", "evaluation.every=5"]


@functools.lru_cache(maxsize=1)
def work() -> Any:
    """Load configuration, shards and model, once in each of Ray's processes."""
    import torch

    from fedelta.learning.shards import build_data
    from fedelta.lora.adapter import initial_adapter
    from fedelta.runs import assemble
    from fedelta.runs.config import load_config

    torch.set_num_threads(1)
    os.chdir(CONFIG.parents[1])
    config = load_config(CONFIG, [*SAME, "model.class_token_alone=false"])
    tokenized, tokenizer = assemble.tokenized_splits(config)
    data = build_data(tokenized, config.data, config.partition, config.seed)
    model = assemble.make_model(config, len(data.classes), tokenizer)
    model.load(initial_adapter(model.shapes, 8, 0).with_scale(2.0), model.head_tensors())
    return config, data, model, tokenizer


def trained() -> dict[str, Any]:
    """Trained parameters by name: LoRA and the head."""
    return {name: p for name, p in work()[2].peft.named_parameters() if p.requires_grad}


def load(arrays: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in trained().items():
            parameter.copy_(arrays[name])


def simulate() -> None:
    """Run Flower's simulation."""
    import torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        config, data, model, tokenizer = work()
        load(message.content["arrays"].to_torch_state_dict())
        shard = data.shards[sorted(data.shards)[int(context.node_config["partition-id"])]].train
        optimizer = torch.optim.AdamW(model.parameters, config.training.learning_rate, weight_decay=0.0)
        model.peft.train()
        order = torch.randperm(len(shard)).tolist()
        size, steps = config.training.batch_size, config.training.steps
        total = 0.0
        for step in range(steps):
            rows = [order[i % len(order)] for i in range(step * size, (step + 1) * size)]
            loss = model.peft(**shard.batch(rows, tokenizer)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach())
        metrics = MetricRecord({"train_loss": total / steps, "num-examples": len(shard)})
        arrays = ArrayRecord({name: p.detach() for name, p in trained().items()})
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def evaluate(examples: Any) -> float:
        _, _, model, tokenizer = work()
        model.peft.eval()
        right = 0
        with torch.no_grad():
            for begin in range(0, len(examples), 64):
                batch = examples.batch(list(range(begin, min(begin + 64, len(examples)))), tokenizer)
                right += int((model.peft(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return right / len(examples)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        config, data, _, _ = work()

        def due(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
            # Like fedelta, do not evaluate before the first round.
            if round_ == 0 or round_ % config.evaluation.every:
                return None
            load(arrays.to_torch_state_dict())
            scores = {"validation": evaluate(data.validation)}
            if round_ == config.rounds:
                scores["test"] = evaluate(data.test)
            print(f"round {round_}: {scores}", flush=True)
            return MetricRecord(scores)

        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=len(data.shards))
        arrays = ArrayRecord({name: p.detach() for name, p in trained().items()})
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=config.rounds, evaluate_fn=due)

    logging.getLogger("flwr").setLevel(logging.WARNING)
    run_simulation(
        server_app,
        client_app,
        num_supernodes=10,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


def timed(command: list[str]) -> tuple[float, str]:
    """Run a process, and return its seconds from start to end and its output."""
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        # Ray's processes import this module, so that `work` loads its data once in each.
        "PYTHONPATH": str(CONFIG.parent),
    }
    begin = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return time.perf_counter() - begin, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    from machine import Machine, keep, table

    import fedelta.runs.runner as runner

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run_seconds = {}
        for dtype in ("float32", "bfloat16"):
            options = [*SAME, f"model.dtype={dtype}", f"output={folder}", f"name={dtype}"]
            run_seconds[dtype], _ = timed(
                [str(Path(sys.executable).with_name("fedelta")), "run", str(CONFIG), *options]
            )
            result = runner.open_run(Path(folder) / dtype).result
            rows.append([f"`fedelta run`, {dtype}", run_seconds[dtype], f"{result['test']['accuracy']:.3f}"])
            print(rows[-1], flush=True)
        flower, printed = timed([sys.executable, "-c", "import flower_simulation; flower_simulation.simulate()"])
        print(printed)
    accuracy = printed.rsplit("'test': ", 1)[1].split("}")[0]
    rows.append(["Flower's simulation on Ray, float32", flower, f"{float(accuracy):.3f}"])
    text = table(
        ["10 rounds of 10 clients", "seconds, start to end", "Flower's time over it", "test accuracy"],
        [[name, f"{taken:.0f}", f"{flower / taken:.2f}×", score] for name, taken, score in rows],
    )
    print(text)
    if arguments.write:
        keep("flower", f"{Machine.measure().describe()}\n\n{text}")


if __name__ == "__main__":
    main()
