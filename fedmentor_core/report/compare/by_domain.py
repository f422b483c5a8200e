"""Every arm's scores in each domain, as bars on one scale per metric."""

from dataclasses import dataclass

from fedmentor_core.compare.records import ComparisonTable
from fedmentor_core.report import words
from fedmentor_core.report.compare.arms import Arms
from fedmentor_core.report.compare.bars import ArmBar, arm_bars, reach
from fedmentor_core.report.plots import Figure

METRICS = ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean")


@dataclass(frozen=True, slots=True)
class MetricByDomain:
    """One metric: a figure per domain."""

    label: str
    note: str
    figures: tuple[Figure, ...]


def metrics_by_domain(table: ComparisonTable, arms: Arms, domains: list[str]) -> list[MetricByDomain]:
    """A group of figures per metric that any arm has by domain."""
    found = []
    for key in METRICS:
        info = words.METRIC[key]
        bars = {domain: _bars(table, arms, domain, key) for domain in domains}
        bars = {domain: some for domain, some in bars.items() if some}
        if not bars:
            continue
        limits = reach([bar for some in bars.values() for bar in some])
        figures = tuple(
            Figure(
                domain,
                "",
                arm_bars(some, alt=f"{info.label} on the test set of {domain} by arm.", show=info.show, limits=limits),
            )
            for domain, some in bars.items()
        )
        note = f"{info.meaning[0].upper()}{info.meaning[1:]}. {info.better.capitalize()} is better."
        found.append(MetricByDomain(info.label, note, figures))
    return found


def _bars(table: ComparisonTable, arms: Arms, domain: str, key: str) -> list[ArmBar]:
    return [
        ArmBar(arm.name, arms.slot(arm.name), estimate.mean, estimate.ci95)
        for arm in table.arms
        if (estimate := arm.by_domain.get(domain, {}).get(key)) is not None
    ]
