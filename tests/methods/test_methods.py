"""Each method's step against a dense float64 oracle, written from the paper's equation without our own algebra."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair, lora_scale
from fedelta.lora.contribution import Contribution
from fedelta.methods import ClientView, MethodState, aliases, make_method, methods
from federations import (
    SHAPES,
    Federation,
    assert_same,
    dense,
    federations,
    global_weight,
    label,
    start,
    state_of,
    train,
    updates,
)

LAYERS = pytest.mark.parametrize("module", SHAPES)


class Round:
    """One module of one round as lists, the input of an oracle. Factors are not padded."""

    def __init__(self, state: MethodState, federation: Federation, trained: list[Contribution], module: str) -> None:
        before = state.adapter[module]
        self.B0, self.A0, self.R = before.B, before.A, before.rank
        self.m, self.n = before.shape
        self.p = federation.p
        self.norms = [sum(float(dense(pair).norm() ** 2) for pair in c.adapter.values()) ** 0.5 for c in trained]
        pairs = [c.adapter[module] for c in trained]
        self.B = [pair.scale * pair.B for pair in pairs]
        self.A = [pair.A for pair in pairs]
        self.indices = [
            list(range(pair.rank)) if c.indices is None else c.indices.tolist()
            for pair, c in zip(pairs, trained, strict=True)
        ]
        self.round = state.round

    def b(self, i: int, j: int) -> Tensor | None:
        return self.B[i][:, self.indices[i].index(j)] if j in self.indices[i] else None

    def a(self, i: int, j: int) -> Tensor | None:
        return self.A[i][self.indices[i].index(j)] if j in self.indices[i] else None

    def holders(self, j: int) -> list[int]:
        return [i for i in range(len(self.p)) if j in self.indices[i]]

    def c(self, j: int) -> float:
        return sum(self.p[i] for i in self.holders(j))

    def zeros(self) -> Tensor:
        return torch.zeros(self.m, self.n, dtype=torch.float64)

    def mean_product(self) -> Tensor:
        return sum((p * B @ A for p, B, A in zip(self.p, self.B, self.A, strict=True)), self.zeros())

    def columns(self, rule: Callable[[int], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """B and A from a rule for each rank index. An index that no client trained keeps its values."""
        pairs = [rule(j) if self.holders(j) else (self.B0[:, j], self.A0[j]) for j in range(self.R)]
        return torch.stack([b for b, _ in pairs], dim=1), torch.stack([a for _, a in pairs])

    def contributor_means(self) -> tuple[Tensor, Tensor]:
        def rule(j: int) -> tuple[Tensor, Tensor]:
            S, c = self.holders(j), self.c(j)
            return sum(self.p[i] * self.b(i, j) for i in S) / c, sum(self.p[i] * self.a(i, j) for i in S) / c

        return self.columns(rule)


Oracle = Callable[[Round], dict[str, Tensor]]
"""Expected results: "B" and "A" if the equation gives factors, "product" of the adapter, "weight" with the patch."""


def factors(B: Tensor, A: Tensor) -> dict[str, Tensor]:
    return {"B": B, "A": A, "weight": B @ A}


def low_rank(matrix: Tensor, begin: int, end: int) -> Tensor:
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, begin:end] * S[begin:end]) @ V[begin:end]


def energy_rank(matrix: Tensor, energy: float) -> int:
    squares = torch.linalg.svdvals(matrix) ** 2
    q = 0
    while squares[:q].sum() < energy * squares.sum() * (1 - 1e-12):
        q += 1
    return q


def fedit(r: Round) -> dict[str, Tensor]:
    return factors(sum(p * B for p, B in zip(r.p, r.B, strict=True)), sum(p * A for p, A in zip(r.p, r.A, strict=True)))


def zero_padded(r: Round, p: list[float]) -> dict[str, Tensor]:
    def rule(j: int) -> tuple[Tensor, Tensor]:
        b = sum((p[i] * r.b(i, j) for i in r.holders(j)), torch.zeros(r.m, dtype=torch.float64))
        a = sum((p[i] * r.a(i, j) for i in r.holders(j)), torch.zeros(r.n, dtype=torch.float64))
        return b, a

    return factors(*r.columns(rule))


def zero_padding(r: Round) -> dict[str, Tensor]:
    return zero_padded(r, r.p)


def hetlora(r: Round) -> dict[str, Tensor]:
    return zero_padded(r, [norm / sum(r.norms) for norm in r.norms])


def replication(r: Round) -> dict[str, Tensor]:
    """Pad first, as in the paper: every client that lacks an index gets the mean of its holders. Then average."""
    mean_B, mean_A = r.contributor_means()

    def rule(j: int) -> tuple[Tensor, Tensor]:
        b = sum(p * (r.b(i, j) if i in r.holders(j) else mean_B[:, j]) for i, p in enumerate(r.p))
        a = sum(p * (r.a(i, j) if i in r.holders(j) else mean_A[j]) for i, p in enumerate(r.p))
        return b, a

    return factors(*r.columns(rule))


def moved(r: Round, factor: str) -> dict[str, Tensor]:
    """Old + Σ p_i × the client's change for one factor. The other factor does not change."""
    B, A = r.B0.clone(), r.A0.clone()
    for i, p in enumerate(r.p):
        for j in r.indices[i]:
            if factor == "B":
                B[:, j] += p * (r.b(i, j) - r.B0[:, j])
            else:
                A[j] += p * (r.a(i, j) - r.A0[j])
    return factors(B, A)


def ffa(r: Round) -> dict[str, Tensor]:
    return moved(r, "B")


def rolora(first: str) -> Oracle:
    return lambda r: moved(r, first if r.round % 2 == 0 else {"A": "B", "B": "A"}[first])


def fedsa(r: Round) -> dict[str, Tensor]:
    return factors(torch.zeros_like(r.B0), r.contributor_means()[1])


def flora(r: Round) -> dict[str, Tensor]:
    stacked_B = torch.cat(r.B, dim=1)
    stacked_A = torch.cat([p * A for p, A in zip(r.p, r.A, strict=True)])
    return {"product": r.zeros(), "weight": stacked_B @ stacked_A}


def florist(energy: float) -> Oracle:
    def oracle(r: Round) -> dict[str, Tensor]:
        whole = r.mean_product()
        return {"product": r.zeros(), "weight": low_rank(whole, 0, energy_rank(whole, energy))}

    return oracle


def flexlora(r: Round) -> dict[str, Tensor]:
    return {"weight": low_rank(r.mean_product(), 0, r.R)}


def rank_normalized(r: Round) -> Tensor:
    total = r.zeros()
    for j in range(r.R):
        for i in r.holders(j):
            total += r.p[i] / r.c(j) * torch.outer(r.b(i, j), r.a(i, j))
        if not r.holders(j):
            total += torch.outer(r.B0[:, j], r.A0[j])
    return total


def raflora(r: Round) -> dict[str, Tensor]:
    return {"weight": low_rank(rank_normalized(r), 0, r.R)}


def raflora_exact(r: Round) -> dict[str, Tensor]:
    return {**factors(*r.contributor_means()), "weight": rank_normalized(r)}


def fedex(r: Round) -> dict[str, Tensor]:
    """The mean of the clients' products, each padded as in replication."""
    mean_B, mean_A = r.contributor_means()
    total = r.zeros()
    for i, p in enumerate(r.p):
        B, A = mean_B.clone(), mean_A.clone()
        for j in r.indices[i]:
            B[:, j], A[j] = r.b(i, j), r.a(i, j)
        total += p * B @ A
    return {**factors(mean_B, mean_A), "weight": total}


def fedex_start(r: Round) -> dict[str, Tensor]:
    total = r.B0 @ r.A0
    for i, p in enumerate(r.p):
        held = r.indices[i]
        total = total + p * (r.B[i] @ r.A[i] - r.B0[:, held] @ r.A0[held])
    return {**factors(*r.contributor_means()), "weight": total}


def fedex_cut(rank: Callable[[Tensor], int]) -> Oracle:
    def oracle(r: Round) -> dict[str, Tensor]:
        B, A = r.contributor_means()
        residual = fedex(r)["weight"] - B @ A
        return {**factors(B, A), "weight": B @ A + low_rank(residual, 0, rank(residual))}

    return oracle


def fed_plora(r: Round) -> dict[str, Tensor]:
    return factors(*r.contributor_means())


def fedmomentum(energy: float) -> Oracle:
    def oracle(r: Round) -> dict[str, Tensor]:
        whole = r.mean_product()
        q = max(energy_rank(whole, energy), r.R)
        return {"product": low_rank(whole, 0, r.R), "weight": low_rank(whole, 0, q)}

    return oracle


def fedsvd(r: Round) -> dict[str, Tensor]:
    return {"weight": moved(r, "B")["weight"]}


def fed_sb(r: Round) -> dict[str, Tensor]:
    basis, _ = torch.linalg.qr(torch.cat(r.B, dim=1))
    core = sum(p * basis.T @ B for p, B in zip(r.p, r.B, strict=True))
    return {"A": r.A0, "weight": basis @ core @ r.A0}


def lora_fair(r: Round) -> dict[str, Tensor]:
    """argmin over ΔB by least squares on the stacked system [Āᵀ; √λ I] ΔBᵀ = [(ΔW − B̄Ā)ᵀ; 0]."""
    mean = fedit(r)
    left = torch.cat([mean["A"].T, 0.1 * torch.eye(r.R, dtype=torch.float64)])
    right = torch.cat([(r.mean_product() - mean["weight"]).T, torch.zeros(r.R, r.m, dtype=torch.float64)])
    return factors(mean["B"] + torch.linalg.lstsq(left, right).solution.T, mean["A"])


ORACLES: list[tuple[str, dict[str, Any], Oracle]] = [
    ("fedit", {}, fedit),
    ("zero-padding", {}, zero_padding),
    ("hetlora", {}, hetlora),
    ("replication", {}, replication),
    ("replication", {"norm_weighting": True}, replication),
    ("ffa", {}, ffa),
    ("rolora", {}, rolora("B")),
    ("rolora", {"first": "A"}, rolora("A")),
    ("fedsa", {}, fedsa),
    ("flora", {}, flora),
    ("flora", {"restart_from": "same"}, flora),
    ("florist", {}, florist(0.9)),
    ("florist", {"energy": 1.0}, florist(1.0)),
    ("flexlora", {}, flexlora),
    ("raflora", {}, raflora),
    ("raflora", {"exact": True}, raflora_exact),
    ("fedex", {}, fedex),
    ("fedex", {"target": "rank-normalized"}, raflora_exact),
    ("fedex", {"target": "start-relative"}, fedex_start),
    ("fedex", {"residual": "rank=2"}, fedex_cut(lambda residual: 2)),  # noqa: ARG005
    ("fedex", {"residual": "energy=0.8"}, fedex_cut(lambda residual: energy_rank(residual, 0.8))),
    # The first round. A separate test covers later rounds.
    ("fedex-keep", {}, fedex),
    ("fed-plora", {}, fed_plora),
    ("fedmomentum", {}, fedmomentum(0.9999)),
    ("fedmomentum", {"energy": 0.5}, fedmomentum(0.5)),
    ("fedsvd", {}, fedsvd),
    ("fed-sb", {}, fed_sb),
    ("lora-fair", {}, lora_fair),
    ("fedrot", {}, fedit),  # the clients have rotated their factors already; a separate test covers the rotation
]
SITUATIONS = {
    "equal ranks": Federation([3, 3, 3], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 3, 1),
    "mixed ranks": Federation([1, 2, 4, 2], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], 4, 2),
    "an index that no client holds": Federation([1, 2], [1.0, 1.0], [1.0, 1.0], 4, 3),
    "mixed α": Federation([2, 2, 2], [lora_scale(alpha, 2) for alpha in (1.0, 4.0, 16.0)], [1.0, 1.0, 1.0], 2, 4),
    "rsLoRA": Federation([4, 4], [lora_scale(8.0, 4, "alpha/sqrt(r)"), lora_scale(8.0, 4)], [1.0, 1.0], 4, 5),
    "unequal weights": Federation([3, 3, 3], [1.0, 1.0, 1.0], [1.0, 10.0, 100.0], 3, 6),
    "one client": Federation([3], [0.5], [7.0], 3, 7),
    "rank 1": Federation([1, 1, 1], [1.0, 2.0, 4.0], [3.0, 2.0, 1.0], 1, 8),
    "everything mixed": Federation([4, 1, 3, 2, 1], [0.3, 2.0, 1.0, 4.0, 1.5], [5.0, 1.0, 30.0, 2.0, 9.0], 4, 9),
}


def check(name: str, options: dict[str, Any], oracle: Oracle, federation: Federation) -> None:
    method = make_method(name, **options)
    state = start(method, federation)
    trained = updates(train(method, state, federation))
    after, patch = method.step(state, iter(trained))
    found = global_weight(after, patch)
    for module, pair in after.adapter.items():
        round_ = Round(state, federation, trained, module)
        if options.get("norm_weighting"):
            round_.p = [norm / sum(round_.norms) for norm in round_.norms]
        expected = oracle(round_)
        parts = {"weight": found[module], "product": dense(pair), "B": pair.B, "A": pair.A}
        for part, matrix in expected.items():
            assert_same({part: parts[part]}, {part: matrix}, 1e-8)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("name", "options", "oracle"), ORACLES, ids=label)
def test_a_step_equals_the_papers_equation(name: str, options: dict[str, Any], oracle: Oracle, situation: str) -> None:
    federation = SITUATIONS[situation]
    mixed = len(set(federation.ranks)) > 1 or federation.largest > max(federation.ranks)
    if mixed and not methods()[name].mixed_ranks:
        return
    check(name, options, oracle, federation)


@pytest.mark.parametrize(("name", "options", "oracle"), ORACLES, ids=label)
@given(federation=federations())
def test_a_step_equals_the_papers_equation_in_random_federations(
    name: str, options: dict[str, Any], oracle: Oracle, federation: Federation
) -> None:
    if not methods()[name].mixed_ranks:
        rank = max(federation.ranks)
        federation = Federation([rank] * len(federation.ranks), federation.scales, federation.weights, rank, 3)
    check(name, options, oracle, federation)


def test_every_method_has_an_oracle() -> None:
    assert {name for name, _, _ in ORACLES} == set(methods())


def test_balanced_factors_have_equal_grams() -> None:
    """U√Σ and √ΣVᵀ: dropping √Σ on one side is a known mistake."""
    for name in ("flexlora", "raflora", "fedmomentum"):
        federation = SITUATIONS["equal ranks"]
        method = make_method(name)
        state = start(method, federation)
        after, _ = method.step(state, updates(train(method, state, federation)))
        for pair in after.adapter.values():
            assert torch.allclose(pair.B.T @ pair.B, pair.A @ pair.A.T, atol=1e-9)
            off = pair.B.T @ pair.B - torch.diag((pair.B.T @ pair.B).diagonal())
            assert off.abs().max() < 1e-9


def test_fedsvd_gives_orthonormal_rows_even_for_directions_without_energy() -> None:
    for rounds in (0, 2):
        method = make_method("fedsvd")
        state = state_of(method, 4, rounds)
        federation = Federation([4, 4], [1.0, 1.0], [1.0, 1.0], 4, 1)
        after, _ = method.step(state, updates(train(method, state, federation, size=0.0 if rounds == 0 else 0.5)))
        for pair in after.adapter.values():
            assert torch.allclose(pair.A @ pair.A.T, torch.eye(4, dtype=torch.float64), atol=1e-9)


def test_fedsvd_refactors_at_its_interval() -> None:
    method = make_method("fedsvd", every=3)
    state = state_of(method, 2, 0)
    federation = Federation([2, 2], [1.0, 1.0], [1.0, 1.0], 2, 1)
    changed = []
    for _ in range(6):
        after, _ = method.step(state, updates(train(method, state, federation)))
        changed.append(not torch.equal(after.adapter["tall"].A, state.adapter["tall"].A))
        state = after
    assert changed == [False, False, True, False, False, True]


def test_directions_without_energy_can_train_again() -> None:
    """A zero column with a zero row would stay zero forever."""
    federation = Federation([1, 1], [1.0, 1.0], [1.0, 1.0], 4, 3)
    for name in ("flexlora", "raflora"):
        method = make_method(name)
        state = method.start(SHAPES, 4, 0)
        after, _ = method.step(state, updates(train(method, state, federation)))
        for pair in after.adapter.values():
            assert pair.A.norm(dim=1).min() > 1e-3


def test_flora_restarts_from_a_fresh_A_or_from_the_same_A() -> None:
    federation = Federation([2], [1.0], [1.0], 2, 0)
    for options, same in (({}, False), ({"restart_from": "same"}, True)):
        method = make_method("flora", **options)
        state = state_of(method, 2, 1)
        after, _ = method.step(state, updates(train(method, state, federation)))
        assert torch.equal(after.adapter["wide"].A, state.adapter["wide"].A) == same
        assert not after.adapter["wide"].B.any()


@pytest.mark.parametrize("round_", [1, 2])
@LAYERS
def test_fedrot_rotates_by_the_orthogonal_procrustes_solution(round_: int, module: str) -> None:
    generator = torch.Generator().manual_seed(round_)
    before, after = (
        LoraPair(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 8), (9, 3))), 2.0)
        for _ in range(2)
    )
    rotated = make_method("fedrot").finish(round_, Adapter({module: before}), Adapter({module: after}))[module]
    factor = (after.A.T, before.A.T) if round_ % 2 else (after.B, before.B)
    Q = torch.from_numpy(scipy.linalg.orthogonal_procrustes(*(x.numpy() for x in factor))[0])
    assert torch.allclose(rotated.A, Q.T @ after.A, atol=1e-9)
    assert torch.allclose(rotated.B, after.B @ Q, atol=1e-9)
    assert torch.allclose(dense(rotated), dense(after), atol=1e-9)


def test_fedrot_with_partial_strength_applies_a_rotation() -> None:
    generator = torch.Generator().manual_seed(5)
    pairs = [
        LoraPair(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 8), (9, 3))))
        for _ in range(2)
    ]
    start_, trained = (Adapter({"x": pair}) for pair in pairs)
    half = make_method("fedrot", strength=0.5).finish(1, start_, trained)["x"]
    assert torch.allclose(dense(half), dense(trained["x"]), atol=1e-9)
    Q = torch.linalg.lstsq(trained["x"].B, half.B).solution
    assert torch.linalg.det(Q) == pytest.approx(1)
    assert (half.A - start_["x"].A).norm() < (trained["x"].A - start_["x"].A).norm()
    assert make_method("fedrot", strength=0.0).finish(1, start_, trained) is trained
    assert make_method("fedrot").finish(0, start_, trained) is trained


def test_hetlora_prunes_a_tail_only_if_it_became_smaller() -> None:
    method = make_method("hetlora", gamma=0.5)
    pair = LoraPair(torch.ones(4, 6), torch.ones(5, 4), 2.0)
    smaller = LoraPair(pair.A, torch.cat([pair.B[:, :2], 0.5 * pair.B[:, 2:]], dim=1), 2.0)
    begun = Adapter({"x": pair})
    assert method.finish(3, begun, Adapter({"x": smaller})).rank == 2
    assert method.finish(3, begun, begun).rank == 4
    assert make_method("hetlora", gamma=0.5, min_rank=3).finish(3, begun, Adapter({"x": smaller})).rank == 3
    assert make_method("hetlora", gamma=1.0).finish(3, begun, Adapter({"x": smaller})).rank == 4


def test_hetlora_penalizes_the_tail() -> None:
    live = Adapter({"x": LoraPair(torch.full((4, 6), 2.0, requires_grad=True), torch.ones(5, 4, requires_grad=True))})
    penalty = make_method("hetlora", gamma=0.5, penalty_weight=0.1).penalty(live, live)
    assert penalty is not None
    assert float(penalty) == pytest.approx(0.1 * (2 * 12**0.5) * 10**0.5)
    penalty.backward()
    assert not live["x"].B.grad[:, :2].any()
    assert live["x"].B.grad[:, 2:].all()
    assert make_method("hetlora", gamma=1.0).penalty(live, live) is None


def test_fed_plora_trains_every_index_over_the_rounds() -> None:
    method = make_method("fed-plora")
    state = state_of(method, 4)
    federation = Federation([1, 2], [1.0, 1.0], [1.0, 1.0], 4, 0)
    seen: set[int] = set()
    for _ in range(12):
        clients = train(method, state, federation, size=0)
        for client, rank in zip(clients, (1, 2), strict=True):
            assert len(set(client.contribution.indices.tolist())) == rank
            seen |= set(client.contribution.indices.tolist())
            # The client's product plus its tail is the whole global product.
            assert_same({"tall": client.weight("tall")}, {"tall": dense(state.adapter["tall"])})
        state, _ = method.step(state, updates(clients))
    assert seen == {0, 1, 2, 3}


def test_fed_plora_draws_different_indices_for_different_clients() -> None:
    method = make_method("fed-plora")
    state = state_of(method, 4)
    drawn = train(method, state, Federation([2] * 8, [1.0] * 8, [1.0] * 8, 4, 0))
    assert len({tuple(client.contribution.indices.tolist()) for client in drawn}) > 2


SENT_TRAINED_RETURNED_KEPT = {
    "ffa": ("B", "B", "B", ""),
    "fedsvd": ("A B", "B", "B", ""),
    "fedsa": ("A", "A B", "A", "B"),
    "flora": ("", "A B", "A B", ""),
    "florist": ("", "A B", "A B", ""),
    "fed-sb": ("core", "core", "core", ""),
}


@pytest.mark.parametrize("name", methods())
def test_the_factor_plan_is_the_papers(name: str) -> None:
    plan = make_method(name).factors(0)
    expected = SENT_TRAINED_RETURNED_KEPT.get(name, ("A B", "A B", "A B", ""))
    if name == "rolora":
        expected = ("A B", "B", "B", "")
        assert make_method(name).factors(1).up == frozenset("A")
    assert (plan.down, plan.train, plan.up, plan.keep) == tuple(frozenset(names.split()) for names in expected)


def test_feedback_is_dropped_once_it_has_been_sent() -> None:
    method = make_method("fedex", residual="rank=2")
    state = state_of(method, 3)
    federation = Federation([3, 3], [1.0, 1.0], [1.0, 1.0], 3, 4)
    state, _ = method.step(state, updates(train(method, state, federation)))
    assert any(key.startswith("feedback/") for key in state.memory)
    # No client trains: the single component that was cut off is sent, and no feedback remains.
    state, patch = method.step(state, updates(train(method, state, federation, size=0)))
    assert set(patch) == set(SHAPES)
    assert not state.memory
    state, patch = method.step(state, updates(train(method, state, federation, size=0)))
    assert not patch


def test_a_residual_step_does_not_scale_the_product_of_a_refresh() -> None:
    federation = SITUATIONS["equal ranks"]
    plain = make_method("fedex", residual_step=0.5)
    state = state_of(make_method("fedex"), 3)
    trained = updates(train(plain, state, federation))
    expected = global_weight(*plain.step(state, trained))
    found = global_weight(*make_method("fedex", residual_step=0.5, refresh=3).step(state, trained))
    assert_same(found, expected)


def test_a_weight_of_zero_stays_zero_with_norm_weighting() -> None:
    federation = Federation([2, 2, 2], [1.0, 1.0, 1.0], [1.0, 0.0, 3.0], 2, 4)
    method = make_method("hetlora", gamma=1.0)
    state = state_of(method, 2)
    trained = updates(train(method, state, federation))
    one, _ = method.step(state, trained)
    two, _ = method.step(state, [trained[0], trained[2]])
    assert_same({m: dense(p) for m, p in one.adapter.items()}, {m: dense(p) for m, p in two.adapter.items()})


def test_without_feedback_fedex_drops_the_part_that_it_cuts_off() -> None:
    federation = Federation([3, 3, 3], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], 3, 4)
    whole, cut = make_method("fedex"), make_method("fedex", residual="rank=1", feedback=False)
    state = state_of(whole, 3)
    for _ in range(3):
        trained = updates(train(whole, state, federation))
        after, patch = whole.step(state, trained)
        kept, cut_patch = cut.step(state, trained)
        assert not kept.memory
        for module in SHAPES:
            assert torch.allclose(dense(cut_patch[module]), low_rank(dense(patch[module]), 0, 1), atol=1e-8)
        state = after


def test_fedex_sends_the_part_that_it_cut_off_in_later_rounds() -> None:
    """Error feedback: the patches plus the kept part equal the sum of all residuals."""
    federation = Federation([3, 3, 3], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], 3, 4)
    whole, cut = make_method("fedex"), make_method("fedex", residual="rank=1")
    state = state_of(whole, 3)
    kept = state
    sums = {m: [torch.zeros(shape, dtype=torch.float64) for _ in range(2)] for m, shape in SHAPES.items()}
    for _ in range(6):
        trained = updates(train(whole, state, federation))
        state, patch = whole.step(state, trained)
        kept, cut_patch = cut.step(kept, trained)
        for module in SHAPES:
            sums[module][0] += dense(patch[module])
            sums[module][1] += dense(cut_patch[module])
            assert cut_patch[module].width == 1
    for module, (full, sent) in sums.items():
        parts = {key.rsplit("/", 1)[1]: t for key, t in kept.memory.items() if key.startswith(f"feedback/{module}/")}
        feedback = parts["W"] if "W" in parts else parts["U"] @ parts["V"]
        assert torch.allclose(sent + feedback, full, atol=1e-8)


@pytest.mark.parametrize("budget", [0, 100, 400, 2000])
def test_a_byte_budget_is_not_exceeded_and_buys_the_most_energy_per_byte(budget: int) -> None:
    federation = SITUATIONS["unequal weights"]
    method = make_method("fedex", residual=f"bytes={budget}")
    state = state_of(method, 3)
    trained = updates(train(method, state, federation))
    _, patch = method.step(state, trained)
    assert sum(product.nbytes for product in patch.values()) <= budget
    if budget == 400:
        residuals = {m: fedex(Round(state, federation, trained, m)) for m in SHAPES}
        energy = {
            m: torch.linalg.svdvals(r["weight"] - r["B"] @ r["A"]) ** 2 / (8 * sum(SHAPES[m]))
            for m, r in residuals.items()
        }
        taken = [float(energy[m][k]) for m in SHAPES for k in range(patch[m].width if m in patch else 0)]
        left = [float(energy[m][patch[m].width if m in patch else 0]) for m in SHAPES]
        sizes = {m: 8 * sum(SHAPES[m]) for m in SHAPES}
        assert taken
        spare = budget - sum(product.nbytes for product in patch.values())
        assert all(value <= min(taken) or sizes[m] > spare for m, value in zip(SHAPES, left, strict=True))


def test_fedex_residual_is_zero_when_all_clients_share_A() -> None:
    federation = Federation([3, 3, 3], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 3, 1)
    method = make_method("fedex")
    state = start(method, federation)
    shared = [
        Contribution(
            c.client, c.weight, c.adapter.map(lambda pair: LoraPair(torch.ones_like(pair.A), pair.B, pair.scale))
        )
        for c in updates(train(method, state, federation))
    ]
    _, patch = method.step(state, shared)
    assert all(dense(product).norm() < 1e-12 for product in patch.values())


def test_fedex_residual_is_not_transposed() -> None:
    """The published reference adds the transposed residual to a Linear. A square layer does not raise an error."""
    federation = Federation([2, 2], [1.0, 1.0], [1.0, 1.0], 2, 4)
    method = make_method("fedex")
    state = start(method, federation)
    trained = updates(train(method, state, federation))
    after, patch = method.step(state, trained)
    exact = sum(0.5 * dense(c.adapter["square"]) for c in trained)
    right = dense(after.adapter["square"]) + dense(patch["square"])
    wrong = dense(after.adapter["square"]) + dense(patch["square"]).T
    assert torch.allclose(right, exact, atol=1e-10)
    assert (wrong - exact).norm() > 0.1 * exact.norm()


def test_patches_have_the_widths_of_the_equations() -> None:
    """(K−1)r for the residual, Σ r_i for the stack. Both are small enough here to stay factors."""
    federation = Federation([1, 2, 1], [1.0] * 3, [1.0, 2.0, 3.0], 2, 1)
    for name, width in (("fedex", 2), ("flora", 4)):
        method = make_method(name)
        state = method.start({"x": (30, 40)}, 2, 0)
        trained = [
            Contribution(str(i), w, Adapter({"x": LoraPair(torch.randn(r, 40), torch.randn(30, r))}))
            for i, (w, r) in enumerate(zip(federation.weights, federation.ranks, strict=True))
        ]
        _, patch = method.step(state, trained)
        assert patch["x"].width == width
        assert patch["x"].nbytes == 4 * width * 70


@pytest.mark.parametrize("clients", [10, 100])
@pytest.mark.parametrize("spread", [0.1, 1e-3, 1e-4])
def test_fp32_residual_keeps_its_digits_if_clients_almost_agree(spread: float, clients: int) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n, r = 96, 80, 8
    B0, A0 = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    pairs = [
        LoraPair(
            A0 + spread * torch.randn(r, n, generator=generator), B0 + spread * torch.randn(m, r, generator=generator)
        )
        for _ in range(clients)
    ]
    exact = sum(pair.B.double() @ pair.A.double() for pair in pairs) / clients
    B, A = sum(pair.B.double() for pair in pairs) / clients, sum(pair.A.double() for pair in pairs) / clients
    exact = exact - B @ A
    method = make_method("fedex")
    state = method.start({"x": (m, n)}, r, 0)
    _, patch = method.step(state, [Contribution(str(i), 1.0, Adapter({"x": pair})) for i, pair in enumerate(pairs)])
    published = sum(pair.B @ pair.A for pair in pairs) / clients - (B.float() @ A.float())
    assert (dense(patch["x"]) - exact).norm() < 1e-6 * exact.norm()
    if spread <= 1e-3:
        assert (published - exact).norm() > 1e-2 * exact.norm()


def test_equal_ranks_give_identical_bytes_for_zero_padding_replication_and_fedit() -> None:
    federation = Federation([3, 3, 3], [8 / 3] * 3, [5.0, 7.0, 11.0], 3, 9)
    results = []
    for name in ("fedit", "zero-padding", "replication"):
        method = make_method(name)
        state = start(method, federation)
        single = [
            Contribution(c.client, c.weight, c.adapter.to(torch.float32))
            for c in updates(train(method, state, federation))
        ]
        state = MethodState(state.round, state.adapter.to(torch.float32))
        after, _ = method.step(state, single)
        results.append(b"".join(p.A.numpy().tobytes() + p.B.numpy().tobytes() for p in after.adapter.values()))
    assert results[0] == results[1] == results[2]


def test_methods_differ_at_mixed_ranks() -> None:
    federation = Federation([1, 2, 4], [1.0] * 3, [1.0] * 3, 4, 2)
    weights = {}
    for name, method_class in methods().items():
        if method_class.mixed_ranks and not method_class.personal:
            method = make_method(name)
            state = start(method, federation)
            weights[name] = global_weight(*method.step(state, updates(train(method, state, federation))))["tall"]
    alike = [(a, b) for a in weights for b in weights if a < b and torch.allclose(weights[a], weights[b])]
    # The steps of FFA and FedSVD are the same function of B until A changes.
    assert alike in ([], [("fedsvd", "ffa")])


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_a_server_optimizer_moves_the_factors_by_its_moments(optimizer: str) -> None:
    federation = SITUATIONS["mixed ranks"]
    plain = make_method("replication")
    method = make_method("replication", server_optimizer=optimizer, server_learning_rate=0.5, server_momentum=0.8)
    state = state_of(plain, 4)
    x, m, v = state.adapter["tall"].B.clone(), 0.0, 0.0
    for _ in range(3):
        trained = updates(train(method, state, federation))
        target = plain.step(state, trained)[0].adapter["tall"].B
        state, _ = method.step(state, trained)
        delta = target - x
        if optimizer == "fedavgm":
            m = 0.8 * m + delta
            x = x + 0.5 * m
        else:
            m, v = 0.8 * m + 0.2 * delta, 0.99 * v + 0.01 * delta**2
            x = x + 0.5 * m / (v**0.5 + 1e-3)
        assert torch.allclose(state.adapter["tall"].B, x, atol=1e-9)


def test_a_refresh_drops_the_optimizers_moments() -> None:
    method = make_method("replication", server_optimizer="fedadam", refresh=2)
    state = method.start(SHAPES, 2, 0)
    federation = Federation([2, 2], [1.0, 1.0], [1.0, 1.0], 2, 1)
    for expected in (True, False, True):
        state, _ = method.step(state, updates(train(method, state, federation)))
        assert any(key.startswith("optimizer/") for key in state.memory) == expected


def test_only_these_methods_collapse_if_no_client_trains() -> None:
    denied = {name for name in methods() if make_method(name).holds().no_op_invariant != "always"}
    assert denied == {"zero-padding", "hetlora", "flexlora"}


def test_a_server_optimizer_needs_factors_that_keep_their_basis() -> None:
    with pytest.raises(FedeltaError, match="flexlora can't have server_optimizer: it needs factors that keep their"):
        make_method("flexlora", server_optimizer="fedadam")


def test_a_residual_step_scales_only_the_patch() -> None:
    federation = SITUATIONS["equal ranks"]
    state = state_of(make_method("fedex"), 3)
    trained = updates(train(make_method("fedex"), state, federation))
    one, patch_one = make_method("fedex").step(state, trained)
    half, patch_half = make_method("fedex", residual_step=0.5).step(state, trained)
    assert_same({m: dense(p) for m, p in patch_half.items()}, {m: 0.5 * dense(p) for m, p in patch_one.items()})
    assert all(torch.equal(half.adapter[m].B, pair.B) for m, pair in one.adapter.items())


def test_norm_weighting_of_clients_that_did_nothing_changes_nothing() -> None:
    method = make_method("hetlora")
    state = method.start(SHAPES, 2, 0)
    idle = Federation([2, 2], [1.0, 1.0], [1.0, 1.0], 2, 0)
    after, _ = method.step(state, updates(train(method, state, idle, size=0)))
    for module, pair in after.adapter.items():
        assert torch.equal(pair.A, state.adapter[module].A)
        assert not pair.B.any()


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(FedeltaError, match="unknown method 'replcation'; did you mean 'replication'"):
        make_method("replcation")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedit", {"tau": 0.9}, "method fedit has no option 'tau'"),
        ("fedex", {"residual": "rank=two"}, "residual 'rank=two': expected exact, rank=q"),
        ("fedex", {"residual": "energy=1.5"}, "residual 'energy=1.5': expected"),
        ("fedex", {"residual": "rank="}, "residual 'rank=': expected"),
        ("fedex", {"target": "unpadded"}, "target: input should be 'replicated', 'rank-normalized' or"),
        ("florist", {"energy": 0}, "method florist: energy: input should be greater than 0, found 0"),
        ("fedex", {"residual": "rank=inf"}, "residual 'rank=inf': expected"),
        ("fedex", {"residual": "bytes=1e999"}, "residual 'bytes=1e999': expected"),
        ("fedex", {"residual": "exact="}, "residual 'exact=': expected"),
        ("fedsa", {"norm_weighting": True}, "method fedsa can't have norm_weighting: the server sees no B"),
        ("fed-sb", {"server_optimizer": "fedavgm"}, "method fed-sb can't have server_optimizer: it would move B"),
        ("rolora", {"refresh": 3}, "method rolora: refresh: 3 rounds would restart before a round that trains"),
        ("fedex-keep", {"refresh": 2}, "method fedex-keep can't have refresh: clients would continue from the factors"),
        ("fedex-keep", {"residual_step": 0.5}, "method fedex-keep can't have residual_step"),
        ("fedit", {"name": "x"}, "method fedit has no option 'name'"),
        ("ffa", {"refresh": "often"}, "method ffa: refresh: input should be a whole number"),
    ],
)
def test_a_wrong_option_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FedeltaError, match=message):
        make_method(name, **options)


@pytest.mark.parametrize(
    ("alias", "name"), [("RBLA", "replication"), ("FediLoRA", "replication"), ("HLoRA", "flexlora")]
)
def test_an_alias_resolves_to_the_registered_name(alias: str, name: str) -> None:
    assert make_method(alias).name == name
    assert aliases()[alias.lower()][0] == name
    assert alias.lower() in aliases()[alias.lower()][1].lower()


@pytest.mark.parametrize("keep", ["A", "B", "both"])
def test_clients_that_keep_factors_start_from_the_same_effective_weight_the_exact_mean(keep: str) -> None:
    """Ten rounds with partial participation, against dense float64."""
    method = make_method("fedex-keep", keep=keep)
    shapes, rank, names = {"layer": (7, 5)}, 2, ["a", "b", "c"]
    draw = torch.Generator().manual_seed(0)
    state = method.start(shapes, rank, 0)
    state = replace(state, adapter=state.adapter.to(torch.float64))
    W = torch.zeros(7, 5, dtype=torch.float64)
    last: dict[str, LoraPair] = {}
    for round in range(10):
        present = names if round % 3 else names[:2]
        mean = state.adapter["layer"]
        effective = W + mean.B @ mean.A
        sent, changes = [], torch.zeros_like(W)
        for name, weight in zip(present, (1.0, 2.0, 5.0), strict=False):
            client_start = method.personalize(state, ClientView(name, rank))
            begin = client_start.adapter["layer"]
            tail = client_start.tail["layer"].U @ client_start.tail["layer"].V if client_start.tail else 0
            torch.testing.assert_close(W + tail + begin.B @ begin.A, effective)
            if name in last:
                assert torch.equal(begin.A, last[name].A if keep != "B" else mean.A)
                assert torch.equal(begin.B, last[name].B if keep != "A" else mean.B)
            trained = LoraPair(
                begin.A + torch.randn(rank, 5, generator=draw).double(),
                begin.B + torch.randn(7, rank, generator=draw).double(),
            )
            last[name] = trained
            sent.append(Contribution(name, weight, Adapter({"layer": trained})))
            share = weight / sum((1.0, 2.0, 5.0)[: len(present)])
            changes += share * (trained.B @ trained.A - begin.B @ begin.A)
        state, patch = method.step(state, sent)
        if "layer" in patch:
            patch["layer"].add_to(W)
        after = state.adapter["layer"]
        torch.testing.assert_close(W + after.B @ after.A, effective + changes)
