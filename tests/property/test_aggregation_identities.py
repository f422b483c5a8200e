"""The algebra of joined low-rank adapters, for any factors: what is exact, what is bounded, what is the best."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmentor_core.adapters.base_delta import delta_factors, delta_tensors
from fedmentor_core.adapters.low_rank import best_factors, stacked, svd_of_product
from fedmentor_core.aggregation import find_rule
from fedmentor_core.aggregation.base import Updates
from fedmentor_core.config import AggregationConfig

SCALE = 2.0
A, B, R = (f"layer.lora_{factor}.weight" for factor in "ABR")
State = dict[str, torch.Tensor]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def clients(draw: Any, least: int = 1, ranks: bool = False) -> tuple[dict[str, float], dict[str, State], int]:
    """Weights, factors by client, and the global rank; of very different sizes, some all zero."""
    n = draw(st.integers(least, 5))
    m, k, rank = draw(st.integers(2, 9)), draw(st.integers(2, 9)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = [draw(st.floats(0.05, 1.0)) for _ in range(n)]
    states = {}
    for client in range(n):
        own = draw(st.integers(1, rank)) if ranks and client else rank
        size = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
        states[str(client)] = {
            A: torch.randn(own, k, generator=generator) * size,
            B: torch.randn(m, own, generator=generator),
        }
    return {str(i): w / sum(raw) for i, w in enumerate(raw)}, states, rank


def product(state: State) -> torch.Tensor:
    """What an adapter adds to its weight matrix, fp64, and what was added to the base."""
    b, a = state[B].double(), state[A].double()
    core = state.get(R)
    total = SCALE * (b if core is None else b @ core.double()) @ a
    added = delta_factors(state, "layer")
    return total if added is None else total + added[0].double() @ added[1].double()


def mean_product(weights: dict[str, float], states: dict[str, State]) -> torch.Tensor:
    return sum(weights[name] * product(state) for name, state in states.items())  # type: ignore[return-value]


def join(rule: str, weights: dict[str, float], states: dict[str, State], before: State, **settings: Any) -> State:
    updates = Updates(weights, states.__getitem__)
    return find_rule(rule).join(AggregationConfig(rule=rule, **settings), SCALE, before, updates)


def size_of(states: dict[str, State]) -> float:
    """The scale that rounding errors of fp32 factors are relative to."""
    return 1e-30 + max(float(SCALE * s[B].double().norm() * s[A].double().norm()) for s in states.values())


@quick
@given(clients())
def test_what_averaging_both_factors_misses_is_the_spread_of_the_factors(given_clients) -> None:
    """sum w BA - Bbar Abar = sum w (B - Bbar)(A - Abar), and a rule without residual misses exactly that."""
    weights, states, _ = given_clients
    joined = join("fedavg", weights, states, states["0"])
    bar_a, bar_b = (sum(weights[n] * s[name].double() for n, s in states.items()) for name in (A, B))
    spread = sum(w * (states[n][B].double() - bar_b) @ (states[n][A].double() - bar_a) for n, w in weights.items())
    missed = mean_product(weights, states) - SCALE * bar_b @ bar_a
    assert torch.allclose(missed, SCALE * spread, rtol=0, atol=1e-12 * size_of(states))
    assert torch.allclose(mean_product(weights, states) - product(joined), SCALE * spread, atol=1e-6 * size_of(states))


@quick
@given(clients())
@pytest.mark.parametrize("trained", ["A", "B"])
def test_where_one_factor_is_common_the_mean_is_exact(trained: str, given_clients) -> None:
    """FFA-LoRA, and either kind of RoLoRA's rounds."""
    weights, states, _ = given_clients
    name, common = (A, B) if trained == "A" else (B, A)
    sent = {client: {name: state[name]} for client, state in states.items()}
    whole = {client: {**state, common: states["0"][common]} for client, state in states.items()}
    joined = join("fedavg", weights, sent, {name: states["0"][name]})
    assert set(joined) == {name}
    found = product({**joined, common: states["0"][common]})
    assert torch.allclose(found, mean_product(weights, whole), atol=1e-6 * size_of(whole))


@quick
@given(clients())
def test_mean_of_cores_is_exact(given_clients) -> None:
    weights, states, rank = given_clients
    generator = torch.Generator().manual_seed(rank)
    cores = {client: {R: torch.randn(rank, rank, generator=generator)} for client in states}
    frozen = {name: states["0"][name] for name in (A, B)}
    joined = join("fedavg", weights, cores, cores["0"])
    whole = {client: {**frozen, **core} for client, core in cores.items()}
    assert torch.allclose(product({**frozen, **joined}), mean_product(weights, whole), atol=1e-5 * size_of(states))


@quick
@given(clients(), st.booleans())
def test_fedex_is_the_mean_of_the_products(given_clients, corrected_before: bool) -> None:
    """To 1e-6, whatever was added to the base before; and the earlier correction is not lost."""
    weights, states, rank = given_clients
    before = dict(states["0"])
    if corrected_before:
        m, k = states["0"][B].shape[0], states["0"][A].shape[1]
        generator = torch.Generator().manual_seed(rank)
        before |= delta_tensors("layer", torch.randn(m, 1, generator=generator), torch.randn(1, k, generator=generator))
    carried = {name: tensor for name, tensor in before.items() if "base_delta" in name}
    joined = join("fedex", weights, states, before)
    whole = {client: {**state, **carried} for client, state in states.items()}
    assert torch.allclose(product(joined), mean_product(weights, whole), atol=1e-6 * (size_of(states) + 10))
    assert joined[A].shape == before[A].shape
    assert all(tensor.dtype == torch.float32 for tensor in joined.values())


@quick
@given(clients(ranks=True))
def test_svd_is_the_best_approximation_of_its_rank(given_clients) -> None:
    """Eckart and Young, against torch's decomposition of the full matrix, for clients of different ranks."""
    weights, states, rank = given_clients
    joined = join("svd", weights, states, states["0"])
    mean = mean_product(weights, states)
    u, s, vt = torch.linalg.svd(mean)
    kept = min(rank, len(s))
    best = (u[:, :kept] * s[:kept]) @ vt[:kept]
    assert joined[A].shape[0] == joined[B].shape[1] == rank
    error, least = (mean - product(joined)).norm(), (mean - best).norm()
    assert float(error - least) <= 1e-5 * (float(s[0]) + 1e-12)
    for lower in range(1, kept):  # a client of a lower rank trains the best of its rank
        cut = product({A: joined[A][:lower], B: joined[B][:, :lower]})
        tail = s[lower:].square().sum().sqrt()
        assert float((mean - cut).norm() - tail) <= 1e-5 * (float(s[0]) + 1e-12)


@quick
@given(clients())
def test_a_direction_that_died_out_can_be_trained_again(given_clients) -> None:
    weights, states, _ = given_clients
    silent = {client: {A: state[A], B: torch.zeros_like(state[B])} for client, state in states.items()}
    start = {A: torch.ones_like(states["0"][A]), B: torch.zeros_like(states["0"][B])}
    joined = join("svd", weights, silent, start)
    assert torch.equal(joined[A], start[A])
    assert not joined[B].any()


@quick
@given(clients())
def test_thin_decomposition_is_that_of_the_product(given_clients) -> None:
    weights, states, _ = given_clients
    b, a = stacked([(weights[n], s[B], s[A]) for n, s in states.items()])
    u, s, vt = svd_of_product(b, a)
    full = torch.linalg.svdvals(b @ a)
    top = float(full[0]) + 1e-12
    assert torch.allclose(s, full[: len(s)], atol=1e-10 * top)
    assert float(full[len(s) :].sum()) <= 1e-10 * top
    assert torch.allclose((u * s) @ vt, b @ a, atol=1e-10 * top)
    assert torch.allclose(u.T @ u, torch.eye(u.shape[1], dtype=u.dtype), atol=1e-8)
    factors = best_factors(b, a, rank=len(s))
    assert torch.allclose(factors[0] @ factors[1], b @ a, atol=1e-10 * top)


@quick
@given(clients(least=3), st.floats(-1e30, 1e30), st.sampled_from(["trimmed-mean", "median"]))
def test_one_poisoned_client_stays_within_the_honest_ones(given_clients, poison: float, rule: str) -> None:
    weights, states, _ = given_clients
    uniform = dict.fromkeys(weights, 1 / len(weights))
    honest = {client: state for client, state in states.items() if client != "0"}
    poisoned = {"0": {name: torch.full_like(t, poison) for name, t in states["0"].items()}, **honest}
    joined = join(rule, uniform, poisoned, states["0"])
    for name, tensor in joined.items():
        values = torch.stack([state[name] for state in honest.values()])
        assert bool((tensor >= values.amin(dim=0)).all())
        assert bool((tensor <= values.amax(dim=0)).all())


@quick
@given(clients(least=3))
def test_one_poisoned_client_moves_a_mean_as_far_as_it_likes(given_clients) -> None:
    """The sabotage that the robust rules are for."""
    weights, states, _ = given_clients
    poisoned = {**states, "0": {name: torch.full_like(t, 1e20) for name, t in states["0"].items()}}
    joined = join("fedavg", weights, poisoned, states["0"])
    assert float(joined[B].min()) > 1e18
