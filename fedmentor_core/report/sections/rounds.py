"""Every round's gate verdict and clients."""

from dataclasses import dataclass

from fedmentor_core.records import RoundSummary, StudySummary
from fedmentor_core.report import words


@dataclass(frozen=True, slots=True)
class Check:
    """A line of a gate verdict."""

    metric: str
    scope: str
    value: str
    bound: str
    against: str
    passed: bool


@dataclass(frozen=True, slots=True)
class ClientLine:
    """A client's part in a round."""

    domain: str
    status: str
    reason: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoundView:
    """A round, to unfold."""

    number: int
    selected: bool
    is_open: bool
    passed: bool
    digest: str
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]
    clients: tuple[ClientLine, ...]


CLIENT_COLUMNS = (
    "units", "sample rate", "steps", "noise", "clip norm", "ε spent", "δ", "up", "down", "time",
)  # fmt: skip
_AGAINST = {
    "none": "a fixed value",
    "baseline": "the untrained model",
    "reference": "the reference run",
    "champion": "the champion",
}


def rounds(summary: StudySummary) -> list[RoundView]:
    """Every round's verdict and clients; the selected (else the last) one unfolded."""
    if not summary.rounds:
        return []
    offset = words.round_offset(summary)
    shown = summary.selected_round if summary.selected_round is not None else summary.rounds[-1].round_index
    return [_round(one, offset, one.round_index == summary.selected_round, shown) for one in summary.rounds]


def _round(one: RoundSummary, offset: int, selected: bool, shown: int) -> RoundView:
    n_passed = sum(result.passed for result in one.gate.results)
    trained = sum(client.status == "trained" for client in one.clients)
    digest = [
        f"{n_passed} of {words.count(len(one.gate.results), 'threshold')} met" if one.gate.results else "no thresholds",
        f"{trained} of {words.count(len(one.clients), 'client')} trained",
        words.show_bytes(one.bytes_total),
        words.show_seconds(one.seconds),
    ]
    checks = []
    for result in one.gate.results:
        info = words.METRIC.get(result.metric) or words.MetricInfo(result.metric, result.metric, "higher", "")
        sign = "≥" if result.comparison == ">=" else "≤"
        digits = info if info.percent else words.MetricInfo(info.key, info.label, info.better, "", digits=4)
        checks.append(
            Check(
                info.label,
                result.scope,
                "not available" if result.value is None else digits.show(result.value),
                "not available" if result.bound is None else f"{sign} {digits.show(result.bound)}",
                _AGAINST[result.relative_to],
                result.passed,
            )
        )
    clients = tuple(
        ClientLine(
            client.domain,
            client.status,
            client.reason,
            (
                f"{client.n_units:,}",
                words.significant(client.sample_rate),
                f"{client.steps:,}",
                words.significant(client.noise_multiplier, 4),
                words.significant(client.clip_norm),
                _of(client.epsilon_spent, client.epsilon_budget),
                words.significant(client.delta, 2),
                words.show_bytes(client.bytes_up),
                words.show_bytes(client.bytes_down),
                words.show_seconds(client.seconds),
            ),
        )
        for client in one.clients
    )
    return RoundView(
        number=one.round_index + offset,
        selected=selected,
        is_open=one.round_index == shown,
        passed=one.gate.passed,
        digest=" · ".join(digest),
        checks=tuple(checks),
        reasons=() if one.gate.results else one.gate.reasons,
        clients=clients,
    )


def _of(spent: float | None, budget: float | None) -> str:
    return words.NONE if spent is None else f"{words.significant(spent)} of {words.significant(budget)}"
