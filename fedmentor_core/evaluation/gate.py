"""The gate: a pure decision from metrics and thresholds. Every line is listed with its value and its bound."""

from collections.abc import Iterator, Mapping

from fedmentor_core.config import ThresholdConfig
from fedmentor_core.records import EvaluationMetrics, GateVerdict, Metrics, ThresholdResult

Comparison = Mapping[str, EvaluationMetrics | None]
NO_CHAMPION = "there is no champion yet"


def judge(metrics: EvaluationMetrics, thresholds: tuple[ThresholdConfig, ...], comparisons: Comparison) -> GateVerdict:
    """Compare a candidate's gate-set metrics with every threshold.

    Args:
        metrics: the candidate's.
        thresholds: the gate's lines; 'each' gives one result per domain.
        comparisons: metrics of the 'baseline' and, where one is configured, the 'reference' run on the same set; and
            of the 'champion': without that key there is none yet, and None says that it cannot be compared.

    Returns:
        Passed only when every line passes. A value that is not available (withheld, NaN) fails its line. A line against
        the champion passes, and says so, while there is no champion: the other lines judge the first one.
    """
    results = tuple(result for threshold in thresholds for result in _lines(metrics, threshold, comparisons))
    return GateVerdict(
        passed=all(result.passed for result in results),
        results=results,
        reasons=tuple(str(result) for result in results if not result.passed),
    )


def _lines(
    metrics: EvaluationMetrics, threshold: ThresholdConfig, comparisons: Comparison
) -> Iterator[ThresholdResult]:
    scopes = list(metrics.by_domain) if threshold.scope == "each" else [threshold.scope]
    for scope in scopes:
        value = _value(metrics, scope, threshold.metric)
        factor = threshold.at_least if threshold.at_least is not None else threshold.at_most
        assert factor is not None
        bound: float | None = factor + threshold.offset
        if threshold.relative_to != "none":
            other = comparisons.get(threshold.relative_to)
            against = None if other is None else _value(other, scope, threshold.metric)
            bound = None if against is None else factor * against + threshold.offset
        first_champion = threshold.relative_to == "champion" and "champion" not in comparisons
        passed = first_champion and value is not None
        if value is not None and bound is not None:
            passed = value >= bound if threshold.at_least is not None else value <= bound
        yield ThresholdResult(
            metric=threshold.metric,
            scope=scope,
            value=value,
            comparison=">=" if threshold.at_least is not None else "<=",
            bound=bound,
            relative_to=threshold.relative_to,
            passed=passed,
            note=NO_CHAMPION if first_champion else "",
        )


def _value(metrics: EvaluationMetrics, scope: str, name: str) -> float | None:
    holder: Metrics | None = metrics if scope == "overall" else metrics.by_domain.get(scope)
    value = None if holder is None else getattr(holder, name)
    return None if value is None or value != value else float(value)
