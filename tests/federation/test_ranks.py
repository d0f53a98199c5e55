import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.errors import FedeltaError
from fedelta.federation.ranks import RankSettings, initial_ranks, promote
from fedelta.settings import quota

CLIENTS = [f"c{i:02d}" for i in range(20)]


def test_uniform_gives_all_clients_the_high_rank() -> None:
    assert set(initial_ranks(CLIENTS, RankSettings(high=7), 0).values()) == {7}


def test_fixed_gives_the_first_share_the_high_rank() -> None:
    ranks = initial_ranks(CLIENTS, RankSettings(allocation="fixed", low=2, high=8, share=0.1), 0)
    assert [c for c in CLIENTS if ranks[c] == 8] == ["c00", "c01"]


def test_random_is_drawn_from_the_seed() -> None:
    settings = RankSettings(allocation="random", low=2, high=8, share=0.25)
    one, same, other = (initial_ranks(CLIENTS, settings, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert sum(rank == 8 for rank in one.values()) == 5


def test_a_list_of_ranks_must_match_the_clients() -> None:
    settings = RankSettings(allocation="fixed", per_client=(1, 2, 3))
    assert initial_ranks(["a", "b", "c"], settings, 0) == {"a": 1, "b": 2, "c": 3}
    assert settings.largest == 3
    with pytest.raises(FedeltaError, match="has 3 ranks, expected one for each of 20 clients"):
        initial_ranks(CLIENTS, settings, 0)


def test_loss_starts_all_clients_low_and_promotes_the_best_newcomer() -> None:
    settings = RankSettings(allocation="loss", low=5, high=20, share=0.1)
    ranks = initial_ranks(CLIENTS, settings, 0)
    assert set(ranks.values()) == {5}
    newcomers = {c: 1.0 + i for i, c in enumerate(CLIENTS[:10])} | {"c07": 0.5}
    after = promote(ranks, {}, newcomers, settings)
    assert [c for c in CLIENTS if after[c] == 20] == ["c07"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.floats(0, 1))
def test_promoted_clients_are_the_share_of_the_clients_that_have_reported(cohorts: list[int], share: float) -> None:
    settings = RankSettings(allocation="loss", low=1, high=2, share=share)
    clients = [f"c{i}" for i in range(sum(cohorts))]
    ranks, losses, unreported = initial_ranks(clients, settings, 0), {}, list(clients)
    for size in cohorts:
        cohort, unreported = unreported[:size], unreported[size:]
        newcomers = {c: float(zlib.crc32(c.encode()) % 97) for c in cohort}
        after = promote(ranks, losses, newcomers, settings)
        assert all(after[c] >= ranks[c] for c in clients), "no client is demoted"
        assert all(after[c] == ranks[c] for c in clients if c not in cohort)
        ranks, losses = after, losses | newcomers
        assert sum(rank == 2 for rank in ranks.values()) == quota(share, len(losses))


def test_mean_parameters_match_byun_and_lee() -> None:
    """10 of 100 clients have rank 20 and the others rank 5, with 552,960 parameters at rank 20.

    The mean is 179,712. The paper prints 179,715.
    """
    ranks = initial_ranks([f"{i}" for i in range(100)], RankSettings(allocation="fixed", low=5, high=20, share=0.1), 0)
    assert sum(552_960 * r / 20 for r in ranks.values()) / 100 == pytest.approx(179_715, abs=4)


def test_reversed_loss_promotes_the_worst_newcomer() -> None:
    settings = RankSettings(allocation="reversed-loss", low=5, high=20, share=0.1)
    newcomers = {c: 1.0 + i for i, c in enumerate(CLIENTS[:10])}
    after = promote(initial_ranks(CLIENTS, settings, 0), {}, newcomers, settings)
    assert [c for c in CLIENTS if after[c] == 20] == ["c09"]


def test_loss_rows_needs_loss_on_server() -> None:
    with pytest.raises(ValueError, match="loss_rows needs loss_on: server, found own"):
        RankSettings(allocation="loss", loss_rows=10)
