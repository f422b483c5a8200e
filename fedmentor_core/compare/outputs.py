"""What a comparison leaves for readers: ``table.csv``, ``table.md``, ``compare.html``, and ``table.json`` last."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedmentor_core.compare.comparison import write_text
from fedmentor_core.compare.records import CellResult, ComparisonTable, Estimate
from fedmentor_core.compare.table import FINAL_METRICS, INTERVALS

JSON, CSV, MARKDOWN, PAGE = "table.json", "table.csv", "table.md", "compare.html"
HEADLINE = ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean")
"""Metrics of the short tables; all others are in ``table.json``, ``table.csv`` and the page."""


def write_outputs(out: Path, table: ComparisonTable, cells: Sequence[CellResult]) -> None:
    """Write all four; replaces those of an earlier start."""
    from fedmentor_core.report.compare.page import render_comparison

    write_text(out / CSV, table_csv(table))
    write_text(out / MARKDOWN, table_markdown(table))
    write_text(out / PAGE, render_comparison(table, cells))
    write_text(out / JSON, table_json(table))


def table_json(table: ComparisonTable) -> str:
    """``table.json``, as ``--json`` prints it."""
    return table.model_dump_json(indent=2) + "\n"


def table_csv(table: ComparisonTable) -> str:
    """One line for each number: of an arm (overall and by domain), of a difference, or of a point of the frontier."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("kind", "arm", "against", "epsilon", "domain", "metric", "mean", "low", "high", "p_value", "n"))
    for arm in table.arms:
        for domain, metrics in (("", arm.metrics), *arm.by_domain.items()):
            for name, found in metrics.items():
                writer.writerow(("arm", arm.name, "", "", domain, name, *_numbers(found), "", found.n))
    for one in table.differences:
        found = Estimate(mean=one.mean, ci95=one.ci95, n=one.n)
        p_value = "" if one.p_value is None else repr(one.p_value)
        writer.writerow(("difference", one.arm, one.against, "", "", one.metric, *_numbers(found), p_value, one.n))
    for point in table.frontier:
        epsilon = "inf" if point.epsilon is None else repr(point.epsilon)
        for name, found in point.metrics.items():
            writer.writerow(("frontier", point.arm, "", epsilon, "", name, *_numbers(found), "", found.n))
    return buffer.getvalue()


def table_markdown(table: ComparisonTable) -> str:
    """The table for a README: short, with everything that must be said beside it."""
    shown = [name for name in HEADLINE if any(name in arm.metrics for arm in table.arms)]
    lines = [f"# Comparison: {table.name}", "", FINAL_METRICS, ""]
    lines += _grid(
        ["arm", "seeds", *shown, "epsilon spent"],
        (
            [
                f"{arm.name}: {arm.title}",
                str(len(arm.seeds)),
                *(_with_interval(arm.metrics.get(name)) for name in shown),
                ", ".join(f"{domain} {spent:.3g}" for domain, spent in arm.epsilon_spent.items())
                or ("-" if arm.name == "base" else "NOT PRIVATE"),
            ]
            for arm in table.arms
        ),
    )
    if table.differences:
        lines += ["", f"## Differences from {table.against}", "", INTERVALS, ""]
        lines += _grid(
            ["arm", "metric", "difference", "95 % interval", "p", "seeds"],
            (
                [
                    one.arm,
                    one.metric,
                    f"{one.mean:+.4f}",
                    "-" if one.ci95 is None else f"{one.ci95[0]:+.4f} to {one.ci95[1]:+.4f}",
                    "-" if one.p_value is None else f"{one.p_value:.3g}",
                    str(one.n),
                ]
                for one in table.differences
                if one.metric in shown
            ),
        )
    if table.frontier:
        lines += ["", "## Utility and safety by budget", "", "Every domain has the same epsilon.", ""]
        lines += _grid(
            ["epsilon", "arm", "seeds", *shown],
            (
                [
                    "none (not private)" if point.epsilon is None else f"{point.epsilon:g}",
                    point.arm,
                    str(max((one.n for one in point.metrics.values()), default=0)),
                    *(_with_interval(point.metrics.get(name)) for name in shown),
                ]
                for point in table.frontier
            ),
        )
    lines += ["", "## To be said", ""] if table.warnings or table.failures else []
    lines += [f"- {warning}" for warning in table.warnings]
    lines += [f"- FAILED: {one}: {one.reason}" for one in table.failures]
    if table.command:
        lines += ["", f"Made with `{table.command}`, {table.seconds_total / 60:.0f} minutes of computing."]
    return "\n".join(lines) + "\n"


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    line = "| {} |".format
    cells = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return [line(" | ".join(head)), line(" | ".join("---" for _ in head)), *(line(" | ".join(row)) for row in cells)]


def _with_interval(found: Estimate | None) -> str:
    if found is None:
        return "-"
    if found.ci95 is None:
        return f"{found.mean:.4f}"
    return f"{found.mean:.4f} ± {(found.ci95[1] - found.ci95[0]) / 2:.4f}"


def _numbers(found: Estimate) -> tuple[str, str, str]:
    low, high = ("", "") if found.ci95 is None else map(repr, found.ci95)
    return repr(found.mean), low, high
