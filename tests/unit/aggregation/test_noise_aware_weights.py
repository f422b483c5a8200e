"""Weights from public numbers: by count, by noise, and their limits."""

import pytest

from fedmentor_core.aggregation.base import normalised
from fedmentor_core.aggregation.weights import noise_variance, raw_weights
from fedmentor_core.config import AggregationConfig
from fedmentor_core.records import ClientUpdate


def update(domain: str, noise: float | None, n_units: int = 100, sample_rate: float = 0.1, **other) -> ClientUpdate:
    fields = {
        "run_id": "r", "round_index": 0, "domain": domain, "status": "trained", "n_units": n_units,
        "sample_rate": sample_rate, "steps": 10, "noise_multiplier": noise, "clip_norm": 1.0, "epsilon_spent": 1.0,
        "epsilon_budget": 8.0, "delta": 1e-5, "bytes_up": 0, "bytes_down": 0, "seconds": 0.0,
    }  # fmt: skip
    return ClientUpdate(**(fields | other))


def weights(updates: list[ClientUpdate], penalty: float = 1.0, level: str = "unit") -> dict[str, float]:
    settings = AggregationConfig(weights="noise-aware", noise_penalty=penalty)
    return dict(normalised(raw_weights(settings, level, updates)))  # type: ignore[arg-type]


def test_uniform_and_by_count() -> None:
    updates = [update("a", 1.0, 100), update("b", 9.0, 300)]
    assert raw_weights(AggregationConfig(), "unit", updates) == {"a": 1.0, "b": 1.0}
    assert raw_weights(AggregationConfig(weights="units"), "unit", updates) == {"a": 100.0, "b": 300.0}


def test_equal_noise_weighs_by_count() -> None:
    updates = [update("a", 2.0, 100, 0.3), update("b", 2.0, 300, 0.1)]  # equal expected batches
    assert weights(updates) == pytest.approx({"a": 0.25, "b": 0.75})


def test_no_penalty_and_no_noise_weigh_by_count() -> None:
    assert weights([update("a", 1.0, 100), update("b", 50.0, 300)], penalty=0.0) == pytest.approx(
        {"a": 0.25, "b": 0.75}
    )
    assert weights([update("a", None, 100), update("b", None, 300)]) == pytest.approx({"a": 0.25, "b": 0.75})


@pytest.mark.parametrize("level", ["unit", "client"])
def test_infinite_noise_counts_for_nothing(level: str) -> None:
    settings = AggregationConfig(weights="noise-aware")
    found = raw_weights(settings, level, [update("a", 1.0), update("b", float("inf"))])  # type: ignore[arg-type]
    assert found["b"] == 0.0
    assert found["a"] > 0
    growing = [weights([update("a", 1.0), update("b", noise)], level=level)["b"] for noise in (1.0, 2.0, 4.0, 100.0)]
    assert growing == sorted(growing, reverse=True)
    assert growing[-1] < 1e-3


def test_a_large_penalty_is_inverse_variance() -> None:
    updates = [update("a", 1.0), update("b", 3.0)]
    assert weights(updates, penalty=1e6) == pytest.approx({"a": 0.9, "b": 0.1}, abs=1e-5)


def test_variance_of_an_update_is_that_of_its_steps() -> None:
    assert noise_variance(update("a", 2.0, 100, 0.1, clip_norm=0.5), "unit") == pytest.approx(10 * (2 * 0.5 / 10) ** 2)
    assert noise_variance(update("a", 2.0, clip_norm=0.5), "client") == pytest.approx((2 * 2 * 0.5) ** 2)


def test_the_weights_minimise_what_the_module_says() -> None:
    import numpy as np
    from scipy.optimize import minimize

    updates = [update("a", 1.0, 100, 0.1), update("b", 2.5, 250, 0.05), update("c", 0.8, 60, 0.2)]
    penalty = 0.7
    found = np.array(list(weights(updates, penalty).values()))
    counts = np.array([one.n_units for one in updates], dtype=float)
    shares = counts / counts.sum()
    variances = np.array([noise_variance(one, "unit") for one in updates])
    noise = penalty * variances / variances.min()
    best = minimize(
        lambda w: (((w - shares) ** 2 + noise * w**2) / shares).sum(), shares,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-14},
    ).x  # fmt: skip
    assert found == pytest.approx(best, abs=1e-5)
