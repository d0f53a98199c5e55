"""Benchmark of one layer: exact residual, truncated residual and FlexLoRA's SVD, compared with published code."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from machine import Machine, forget_peak, seconds, table
from torch import Tensor

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.methods import Method, MethodState, make_method
from fedelta.sweep.provenance import peak_mb

LAYERS = {
    "RoBERTa-base query": (768, 768),
    "RoBERTa-base intermediate": (3072, 768),
    "Llama-3.2-3B q_proj": (3072, 3072),
    "Llama-3.2-3B up_proj": (8192, 3072),
    "Mistral-7B q_proj": (4096, 4096),
    "Mistral-7B up_proj": (14336, 4096),
}
SCALE = 2.0


def clients(m: int, n: int, K: int, r: int, spread: float = 0.1) -> list[LoraPair]:
    """Draw clients' factors, which differ from each other by `spread`, relative to their size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B0, A0 = normal(m, r), normal(r, n)
    return [LoraPair(A0 + spread * normal(r, n), B0 + spread * normal(m, r), SCALE) for _ in range(K)]


def round_of(pairs: list[LoraPair]) -> tuple[MethodState, list[Contribution]]:
    r, (m, n) = pairs[0].rank, pairs[0].shape
    state = MethodState(0, Adapter({"x": LoraPair(torch.zeros(r, n), torch.zeros(m, r))}))
    return state, [Contribution(str(i), 1.0, Adapter({"x": pair})) for i, pair in enumerate(pairs)]


def published(pairs: list[LoraPair]) -> Tensor:
    """Residual (m, n) as in the reference code of arXiv 2410.09432: sum of dense products, mean, difference, scale."""
    B, A = torch.stack([p.B for p in pairs]), torch.stack([p.A for p in pairs])
    M = sum(B[i] @ A[i] for i in range(len(pairs))) / len(pairs)
    return (M - B.mean(0) @ A.mean(0)) * SCALE


def published_fold(pairs: list[LoraPair], weight: Tensor) -> None:
    """Add the published residual to the weight. The reference code transposes it, which is not correct."""
    weight += published(pairs)


def dense_svd(pairs: list[LoraPair], rank: int) -> tuple[Tensor, Tensor]:
    """FlexLoRA as published: the dense mean product, its full SVD, and its first components, balanced."""
    mean = sum(p.scale * p.B @ p.A for p in pairs) / len(pairs)
    left, sigma, right = torch.linalg.svd(mean, full_matrices=False)
    root = sigma[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def ours(method: Method, pairs: list[LoraPair]) -> Callable[[], object]:
    state, contributions = round_of(pairs)
    return lambda: method.step(state, iter(contributions))


def our_fold(pairs: list[LoraPair], weight: Tensor) -> Callable[[], None]:
    state, contributions = round_of(pairs)
    fedex = make_method("fedex")

    def fold() -> None:
        _, patch = fedex.step(state, iter(contributions))
        patch["x"].add_to(weight)

    return fold


def speed(machine: Machine, layers: list[str], Ks: list[int], ranks: list[int]) -> str:
    rows = []
    fedex, flexlora = make_method("fedex"), make_method("flexlora")
    for layer in layers:
        m, n = LAYERS[layer]
        weight = torch.randn(m, n)
        svd = None
        for r in ranks:
            cut = make_method("fedex", residual=f"rank={r}")
            for K in Ks:
                pairs = clients(m, n, K, r)
                old = seconds(partial(published_fold, pairs, weight))
                fold, factors = seconds(our_fold(pairs, weight)), seconds(ours(fedex, pairs))
                U, V = torch.randn(m, (K - 1) * r), torch.randn((K - 1) * r, n)
                # Two limits: this GEMM alone, and the time of its operations at the machine's best rate.
                gemm = seconds(partial(weight.addmm_, U, V))
                roof = max(2 * m * n * (K - 1) * r / machine.fp32, 2 * weight.nbytes / machine.bandwidth)
                if svd is None:
                    svd = seconds(partial(dense_svd, pairs, r), repeats=1, enough=0.5)
                flex, shorter = seconds(ours(flexlora, pairs)), seconds(ours(cut, pairs))
                rows.append(
                    [
                        f"{layer} {m}×{n}",
                        str(K),
                        str(r),
                        f"{1e3 * old:.1f}",
                        f"{old / fold:.1f}×",
                        f"{100 * gemm / fold:.0f} %",
                        f"{100 * roof / fold:.0f} %",
                        f"{old / factors:.0f}×",
                        f"{1e3 * svd:.0f}",
                        f"{svd / flex:.0f}×",
                        f"{svd / shorter:.0f}×",
                    ]
                )
                print(" | ".join(rows[-1]), flush=True)
    head = [
        "layer",
        "K",
        "r",
        "published residual, ms",
        "fold into W",
        "of the GEMM limit",
        "of the roofline",
        "factors for the wire",
        "dense SVD, ms",
        "flexlora",
        "fedex cut to r",
    ]
    return table(head, rows)


def accuracy() -> str:
    rows = []
    m, n, r = 1024, 1024, 16
    for K in (10, 100):
        for spread in (0.1, 1e-2, 1e-3, 1e-4):
            pairs = clients(m, n, K, r, spread)
            double = [LoraPair(p.A.double(), p.B.double(), p.scale) for p in pairs]
            B, A = sum(p.B for p in double) / K, sum(p.A for p in double) / K
            exact = sum((p.B - B) @ (p.A - A) for p in double) * SCALE / K
            state, contributions = round_of(pairs)
            weight = torch.zeros(m, n, dtype=torch.float64)
            for product in make_method("fedex").step(state, iter(contributions))[1].values():
                product.add_to(weight)
            errors = [float((value.double() - exact).norm() / exact.norm()) for value in (published(pairs), weight)]
            rows.append([str(K), f"{spread:g}", f"{errors[0]:.1g}", f"{errors[1]:.1g}"])
    return table(["K", "spread of clients / mean", "published, fp32", "fedelta, fp32"], rows)


def memory() -> str:
    """Measure peak memory beyond the inputs and the weight, each method in a separate process."""
    rows = []
    for layer in ("RoBERTa-base query", "Mistral-7B q_proj", "Mistral-7B up_proj"):
        peaks = []
        for way in ("published", "fold", "plan"):
            command = [sys.executable, __file__, "--peak", way, "--layer", layer]
            peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        rows.append([f"{layer} {'×'.join(map(str, LAYERS[layer]))}", *(f"{mb:.0f}" for mb in peaks)])
    return table(["layer, K = 10, r = 16", "published, MB", "fold into W, MB", "factors for the wire, MB"], rows)


def _peak(way: str, layer: str) -> None:
    m, n = LAYERS[layer]
    weight = torch.zeros(m, n) + 1
    pairs = clients(m, n, 10, 16)
    small = clients(64, 64, 3, 2)
    work = {"published": lambda p, w: published_fold(p, w), "fold": lambda p, w: our_fold(p, w)()}
    work["plan"] = lambda p, w: ours(make_method("fedex"), p)()  # noqa: ARG005
    work[way](small, torch.zeros(64, 64))  # The first call loads libraries, which must not count.
    forget_peak()
    before = peak_mb()
    work[way](pairs, weight)
    print(peak_mb() - before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", required=True)
    parser.add_argument("--layer", required=True)
    arguments = parser.parse_args()
    _peak(arguments.peak, arguments.layer)
