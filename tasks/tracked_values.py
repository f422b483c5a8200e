"""What of a study is tracked, under which names: public numbers and flat parameters."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fedmentor_core.records import (
    ClientSummary,
    EvaluationMetrics,
    Metrics,
    Record,
    RoundSummary,
    SafetyEvaluation,
    StudySummary,
)
from tasks.mlflow_connection import cut, redact

MAX_PARAM_CHARS = 500
SCORES = tuple(name for name in Metrics.model_fields if name != "intervals")
"""Metrics that are one number."""


def round_metrics(summary: RoundSummary) -> dict[str, float]:
    """The public numbers of one round under their MLflow names."""
    values = scores("gate", summary.metrics)
    values["gate/passed"] = float(summary.gate.passed)
    values["bytes_total"] = float(summary.bytes_total)
    values["round_seconds"] = summary.seconds
    values["clients_trained"] = float(sum(one.status == "trained" for one in summary.clients))
    for one in summary.clients:
        for name in ("epsilon_spent", "epsilon_budget", "noise_multiplier"):
            value = getattr(one, name)
            if value is not None:
                values[f"privacy/{one.domain}/{name}"] = value
        values[f"traffic/{one.domain}/bytes_up"] = float(one.bytes_up)
        values[f"traffic/{one.domain}/bytes_down"] = float(one.bytes_down)
    return values


def round_tags(summary: RoundSummary) -> dict[str, str]:
    """The gate's verdict and the noise changes of one round, in words."""
    changes = [
        f"{change.domain}: {change.from_:.4g} -> {change.to:.4g} ({change.reason})" for change in summary.noise_changes
    ]
    return {
        "fedmentor.gate": "passed" if summary.gate.passed else "failed",
        "fedmentor.gate_reasons": "; ".join(summary.gate.reasons) or "every threshold passed",
        "fedmentor.noise_changes": "; ".join(changes) or "none",
    }


def client_metrics(one: ClientSummary) -> dict[str, float]:
    """The numbers of one client's part of a round."""
    return numbers(one)


def numbers(record: Record) -> dict[str, float]:
    """A record's fields that are one number."""
    return {
        key: float(value)
        for key, value in record.model_dump().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def safety_scores(prefix: str, answers: SafetyEvaluation) -> dict[str, float]:
    """Answers to each set of safety prompts as ``PREFIX/safety/SET/NAME``."""
    return {f"{prefix}/safety/{one.name}/{key}": value for one in answers.sets for key, value in numbers(one).items()}


def final_metrics(summary: StudySummary) -> dict[str, float]:
    """The study's result: ``baseline/*`` and ``final/*`` (test set), ``baseline_gate/*`` and ``final_gate/*``.

    Answers to safety prompts are in ``baseline/safety/*`` and ``final/safety/*``, the scorer's false alarms in
    ``alarms/*``.
    """
    values = scores("baseline", summary.baseline) | scores("baseline_gate", summary.baseline_gate)
    values["final/seconds_total"] = summary.seconds_total
    if summary.final is not None:
        values |= scores("final", summary.final)
    for one in summary.rounds:
        if one.round_index == summary.selected_round:
            values |= scores("final_gate", one.metrics)
    for prefix, answers in (("baseline", summary.safety_baseline), ("final", summary.safety_final)):
        values |= {} if answers is None else safety_scores(prefix, answers)
    for domain, alarms in summary.alarms.items():
        values |= {f"alarms/{domain}/{key}": value for key, value in numbers(alarms).items()}
    return values


def final_tags(summary: StudySummary) -> dict[str, str]:
    """How the study ended."""
    return {
        "fedmentor.status": summary.status,
        "fedmentor.private": "true" if summary.private else "false",
        "fedmentor.selected_round": str(summary.selected_round),
        "fedmentor.model": f"{summary.model.name}/{summary.model.version}" if summary.model else "none",
        "fedmentor.backbone_sha256": summary.backbone.sha256,
        "fedmentor.scorers": summary.scorers.model_dump_json(),
    }


def scores(prefix: str, metrics: EvaluationMetrics) -> dict[str, float]:
    """Overall metrics as ``PREFIX/NAME``, each domain's as ``PREFIX/DOMAIN/NAME``; only what was measured."""
    values: dict[str, float] = {}
    for scope, found in (("", metrics), *((f"{name}/", one) for name, one in metrics.by_domain.items())):
        for name in SCORES:
            value = getattr(found, name)
            if value is not None:
                values[f"{prefix}/{scope}{name}"] = float(value)
    return values


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"a.b.0": "text"}``; a list item that has a name goes by its name."""
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[str, Any]] = ((str(key), item) for key, item in value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = (
            (str(item["name"]) if isinstance(item, Mapping) and "name" in item else str(index), item)
            for index, item in enumerate(value)
        )
    else:
        text = redact(value) if isinstance(value, str) and "://" in value else value
        shown = text if isinstance(text, str) else json.dumps(text)
        return {prefix: cut(shown, MAX_PARAM_CHARS)}
    flat: dict[str, str] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat
