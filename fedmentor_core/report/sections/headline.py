"""The top of the report: status, final scores, budgets, and what the study cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedmentor_core.config import StudyConfig
from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.records import EvaluationMetrics, StudySummary
from fedmentor_core.report import words
from fedmentor_core.report.metric_noise import MetricNoise
from fedmentor_core.report.sections.scores import Score, ScoreRow, score_rows, scores


@dataclass(frozen=True, slots=True)
class Headline:
    """The band at the top."""

    status: str
    status_class: str
    explanation: str
    reasons: tuple[str, ...]
    private: bool
    privacy_reason: str
    scores: tuple[Score, ...]
    scores_title: str
    scores_note: str
    facts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """Epsilon of one domain in the headline."""

    domain: str
    spent: str
    budget: str
    percent: float
    over: bool


def headline(summary: StudySummary, config: StudyConfig, accounts: Sequence[LedgerView] = ()) -> Headline:
    """Status, privacy and the final scores, or the newest gate scores where nothing was selected."""
    private, privacy_reason = words.privacy_verdict(summary, config, _doubts(accounts))
    status, explanation = words.STATUS_WORDS[summary.status]
    offset = words.round_offset(summary)
    last = summary.rounds[-1] if summary.rounds else None
    selected = None if summary.selected_round is None else summary.selected_round + offset
    if summary.status == "promoted" and selected is not None:
        explanation = f"The adapter of round {selected} passed every threshold of the gate."
    reasons: tuple[str, ...] = ()
    if summary.status != "promoted" and last is not None:
        reasons = last.gate.reasons
        reasons += tuple(
            f"{client.domain} {client.status}: {client.reason}" for client in last.clients if client.reason
        )
    if summary.final is not None:
        where = "the selected adapter" if selected is None else f"the adapter of round {selected}"
        title = "Final result, on the test set"
        shown = _overall(summary.final, summary.baseline, MetricNoise.of(summary.plan, "test"))
        note = (
            f"{where[0].upper()}{where[1:]} against the untrained backbone, on a test set of "
            f"{words.count(summary.final.n_examples, 'example')} that no decision looked at: it steered "
            "neither the noise, nor the gate, nor the choice of round."
        )
    elif last is not None:
        title = f"No final result. Gate set, round {last.round_index + offset}"
        shown = _overall(last.metrics, summary.baseline_gate, MetricNoise.of(summary.plan, "gate"))
        note = (
            "No adapter was selected, so no result was measured on the test set. These scores are from the "
            "gate set, which steered the study: read them as a diagnosis, not as a result."
        )
    else:
        title, shown = "No final result", ()
        note = "The study ended before its first round was complete."
    return Headline(
        status=status,
        status_class=summary.status.replace("_", "-"),
        explanation=explanation,
        reasons=reasons,
        private=private,
        privacy_reason=privacy_reason,
        scores=shown,
        scores_title=title,
        scores_note=note,
        facts=_facts(summary, config),
    )


def budget_lines(summary: StudySummary) -> list[BudgetLine]:
    """Last known epsilon of every domain against its budget."""
    spent: dict[str, BudgetLine] = {}
    for one in summary.rounds:
        for client in one.clients:
            if client.epsilon_spent is None or not client.epsilon_budget:
                continue
            spent[client.domain] = BudgetLine(
                client.domain,
                words.significant(client.epsilon_spent),
                words.significant(client.epsilon_budget),
                round(100 * client.epsilon_spent / client.epsilon_budget, 1),
                client.epsilon_spent > client.epsilon_budget * (1 + 1e-9),
            )
    return list(spent.values())


def final_rows(summary: StudySummary) -> list[ScoreRow]:
    """The final result by domain, the mean first; empty without a final result."""
    if summary.final is None:
        return []
    return score_rows(summary.final, summary.baseline, MetricNoise.of(summary.plan, "test"))


def gate_history(summary: StudySummary) -> list[tuple[str, list[ScoreRow]]]:
    """The numbers behind the plots: the untrained model, then each round."""
    offset = words.round_offset(summary)
    noise = MetricNoise.of(summary.plan, "gate")
    history = [("untrained", score_rows(summary.baseline_gate, None, noise))]
    for one in summary.rounds:
        history.append((f"round {one.round_index + offset}", score_rows(one.metrics, summary.baseline_gate, noise)))
    return history


def _doubts(accounts: Sequence[LedgerView]) -> list[str]:
    """What the ledgers say against calling the study private."""
    broken = [f"the ledger of {one.domain} is broken, so what was spent is not known" for one in accounts
              if not one.verified]  # fmt: skip
    seeded = [f"the ledger of {one.domain} holds a charge for seeded noise" for one in accounts if not one.private]
    return broken + seeded


def _overall(metrics: EvaluationMetrics, before: EvaluationMetrics, noise: MetricNoise) -> tuple[Score, ...]:
    return scores(metrics, before, noise.of_mean(list(metrics.by_domain)))


def _facts(summary: StudySummary, config: StudyConfig) -> tuple[tuple[str, str, str], ...]:
    facts = []
    if summary.rounds:
        mean = sum(one.bytes_total for one in summary.rounds) / len(summary.rounds)
        clients = len({client.domain for one in summary.rounds for client in one.clients})
        under = f"{words.count(clients, 'client')}, up and down"
        facts.append(("Traffic per round", words.show_bytes(mean), under))
    facts.append(
        (
            "Total time",
            words.show_seconds(summary.seconds_total),
            f"{len(summary.rounds)} of {words.count(config.rounds, 'round')}",
        )
    )
    if summary.model is None:
        facts.append(("Registered model", "none", "nothing was registered"))
    else:
        aliases = ", ".join(f"@{alias}" for alias in summary.model.aliases) or "no alias"
        facts.append(("Registered model", f"{summary.model.name} v{summary.model.version}", aliases))
    return tuple(facts)
