"""What the template shows, as plain frozen values: all choices are made here, none in the template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fedmentor_core.config import StudyConfig
from fedmentor_core.records import DomainPlan, EvaluationMetrics, Metrics, RoundSummary, Sample, StudySummary
from fedmentor_core.report import words


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one set of outputs, against the untrained model."""

    label: str
    meaning: str
    value: str
    before: str
    difference: str
    judgement: str


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A line of a score table."""

    name: str
    n_examples: int
    scores: tuple[Score, ...]


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


@dataclass(frozen=True, slots=True)
class NoiseLine:
    """A decision about noise."""

    number: int
    domain: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """Samples of one domain."""

    domain: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class SampleSet:
    """Samples of one adapter."""

    title: str
    groups: tuple[SampleGroup, ...]


@dataclass(frozen=True, slots=True)
class PlanLine:
    """What one domain was promised: a sentence and its numbers."""

    domain: str
    sentence: str
    cells: tuple[str, ...]
    refusals: tuple[str, ...]


CLIENT_COLUMNS = (
    "units", "sample rate", "steps", "noise", "clip norm", "ε spent", "δ", "up", "down", "time",
)  # fmt: skip
PLAN_COLUMNS = (
    "sensitivity", "units", "ε budget", "spent before", "ε planned", "ε by PRV", "δ", "kept back",
    "noise", "least noise", "sample rate", "steps", "clip norm",
)  # fmt: skip


_AGAINST = {"none": "a fixed value", "baseline": "the untrained model", "reference": "the reference run"}


def headline(summary: StudySummary, config: StudyConfig) -> Headline:
    """Status, privacy and the final scores, or the newest gate scores where nothing was selected."""
    private, privacy_reason = words.privacy_verdict(summary, config)
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
        title, scores = "Final result, on the test set", _scores(summary.final, summary.baseline)
        note = (
            f"{where[0].upper()}{where[1:]} against the untrained backbone, on a test set of "
            f"{words.count(summary.final.n_examples, 'example')} that no decision looked at: it steered "
            "neither the noise, nor the gate, nor the choice of round."
        )
    elif last is not None:
        title = f"No final result. Gate set, round {last.round_index + offset}"
        scores = _scores(last.metrics, summary.baseline_gate)
        note = (
            "No adapter was selected, so no result was measured on the test set. These scores are from the "
            "gate set, which steered the study: read them as a diagnosis, not as a result."
        )
    else:
        title, scores = "No final result", ()
        note = "The study ended before its first round was complete."
    return Headline(
        status=status,
        status_class=summary.status.replace("_", "-"),
        explanation=explanation,
        reasons=reasons,
        private=private,
        privacy_reason=privacy_reason,
        scores=scores,
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
    return _rows(summary.final, summary.baseline)


def gate_history(summary: StudySummary) -> list[tuple[str, list[ScoreRow]]]:
    """The numbers behind the plots: the untrained model, then each round."""
    offset = words.round_offset(summary)
    history = [("untrained", _rows(summary.baseline_gate, None))]
    for one in summary.rounds:
        history.append((f"round {one.round_index + offset}", _rows(one.metrics, summary.baseline_gate)))
    return history


def rounds(summary: StudySummary) -> list[RoundView]:
    """Every round's verdict and clients; the selected (else the last) one unfolded."""
    if not summary.rounds:
        return []
    offset = words.round_offset(summary)
    shown = summary.selected_round if summary.selected_round is not None else summary.rounds[-1].round_index
    return [_round(one, offset, one.round_index == summary.selected_round, shown) for one in summary.rounds]


def noise_lines(summary: StudySummary) -> list[NoiseLine]:
    """Every noise decision with its reason."""
    offset = words.round_offset(summary)
    return [
        NoiseLine(
            one.round_index + offset,
            change.domain,
            words.significant(change.from_, 4),
            words.significant(change.to, 4),
            change.reason,
        )
        for one in summary.rounds
        for change in one.noise_changes
    ]


def sample_sets(
    summary: StudySummary,
    config: StudyConfig,
    samples: Sequence[Sample],
    round_samples: Mapping[int, Sequence[Sample]] | None,
) -> list[SampleSet]:
    """Samples to show; none at all where the gate set is private, whatever was passed in."""
    if config.evaluation.gate_data != "public":
        return []
    offset = words.round_offset(summary)
    sets = []
    if samples:
        selected = summary.selected_round
        title = "The last adapter" if selected is None else f"Round {selected + offset} (selected)"
        sets.append(SampleSet(title, _by_domain(samples)))
    for index, some in sorted((round_samples or {}).items()):
        if some and tuple(some) != tuple(samples):
            sets.append(SampleSet(f"Round {index + offset}", _by_domain(some)))
    return sets


def plan_lines(summary: StudySummary, config: StudyConfig) -> list[PlanLine]:
    """The privacy plan, for each domain a sentence and its numbers."""
    units = {domain.name: _unit_of(domain) for domain in config.domains}
    return [_plan_line(plan, units.get(plan.domain, "post")) for plan in summary.plan.domains]


def settings_yaml(config: StudyConfig) -> str:
    """Every setting as YAML that ``fedmentor run --config`` reads; passwords in URLs are blanked."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return words.hide_credentials(text)


def identities(summary: StudySummary) -> list[tuple[str, str]]:
    """What exactly was run and what scored it."""
    backbone, adapter = summary.backbone, summary.adapter
    trained = "B only, A frozen and shared (FFA-LoRA)" if adapter.train == "b" else "A and B"
    pairs = [
        ("Backbone", f"{backbone.name}, {backbone.n_parameters:,} parameters"),
        ("Backbone revision", backbone.revision or ""),
        ("Backbone sha256", backbone.sha256),
        (
            "Adapter",
            f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.target_modules)}; "
            f"trains {trained}: {adapter.n_trainable:,} parameters, {words.show_bytes(adapter.n_bytes)}",
        ),
        ("BERTScore by", summary.scorers.bertscore),
        ("ROUGE-L by", summary.scorers.rouge),
        ("Toxicity by", summary.scorers.toxicity),
        ("An output is safe when", f"its toxicity is below {summary.scorers.safe_threshold:g}"),
        ("Settings sha256", summary.config_sha256),
        ("Run", summary.run_id),
        ("Store", words.hide_credentials(summary.store_url)),
        ("MLflow", words.hide_credentials(summary.tracking_uri or "")),
        ("MLflow run", summary.mlflow_run_id or ""),
    ]
    return [(name, value) for name, value in pairs if value]


def _scores(metrics: Metrics, before: Metrics | None) -> tuple[Score, ...]:
    scores = []
    for info in words.METRICS:
        value, base = words.get(metrics, info.key), words.get(before, info.key)
        difference = None if value is None or base is None else value - base
        scores.append(
            Score(
                info.label,
                info.meaning,
                info.show(value) if value is not None else "not released",
                "" if before is None else info.show(base),
                info.show_difference(difference),
                info.judge(difference),
            )
        )
    return tuple(scores)


def _rows(metrics: EvaluationMetrics, before: EvaluationMetrics | None) -> list[ScoreRow]:
    rows = [ScoreRow("all domains", metrics.n_examples, _scores(metrics, before))]
    for name, own in metrics.by_domain.items():
        base = None if before is None else before.by_domain.get(name)
        rows.append(ScoreRow(name, own.n_examples, _scores(own, base)))
    return rows


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


def _by_domain(samples: Sequence[Sample]) -> tuple[SampleGroup, ...]:
    names = list(dict.fromkeys(sample.domain for sample in samples))
    return tuple(SampleGroup(name, tuple(s for s in samples if s.domain == name)) for name in names)


def _plan_line(plan: DomainPlan, unit: str) -> PlanLine:
    if plan.noise_multiplier is None or plan.epsilon_budget is None:
        sentence = "No privacy was planned here: the updates carry no noise and nothing is promised."
    else:
        before = plan.epsilon_spent_before
        spent = f" Earlier studies had already spent {words.significant(before)} of it." if before else ""
        planned = (
            ""
            if plan.epsilon_planned_rdp is None
            else f" This study planned to bring the total to {words.significant(plan.epsilon_planned_rdp)}."
        )
        sentence = (
            f"Any conclusion that anyone draws from what this domain released for training is "
            f"{words.promise(plan.epsilon_budget, plan.delta, unit)}. That is its lifetime budget, "
            f"ε = {words.significant(plan.epsilon_budget)}, over every study charged to the same ledger."
            f"{spent}{planned} Each step sees each {unit} with probability "
            f"{words.significant(plan.sample_rate)}; its influence is limited (clip norm "
            f"{words.significant(plan.clip_norm)}) and hidden under noise "
            f"{words.significant(plan.noise_multiplier)} times as large."
        )
    cells: tuple[Any, ...] = (
        plan.sensitivity or "set by hand",
        f"{plan.n_units:,}",
        words.significant(plan.epsilon_budget),
        words.significant(plan.epsilon_spent_before),
        words.significant(plan.epsilon_planned_rdp),
        words.significant(plan.epsilon_planned_prv),
        words.significant(plan.delta, 2),
        f"{100 * plan.reserve_fraction:.0f} %",
        words.significant(plan.noise_multiplier, 4),
        words.significant(plan.min_noise_multiplier),
        words.significant(plan.sample_rate),
        f"{plan.steps_per_round:,} × {plan.rounds:,}",
        words.significant(plan.clip_norm),
    )
    return PlanLine(plan.domain, sentence, cells, plan.refusals)


def _unit_of(domain: Any) -> str:
    columns = getattr(domain.source, "columns", None)
    unit = getattr(columns, "unit", None)
    return f"{unit} (the unit column)" if unit else "post"
