"""The report: one HTML file that needs nothing else and asks nothing of the network."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fedmentor_core.config import StudyConfig
from fedmentor_core.records import Sample, StudySummary
from fedmentor_core.report import plots, view, words

if TYPE_CHECKING:
    from jinja2 import Template


def build_report(
    summary: StudySummary,
    config: StudyConfig,
    samples: Sequence[Sample],
    *,
    round_samples: Mapping[int, Sequence[Sample]] | None = None,
) -> str:
    """A whole study as one HTML page.

    Args:
        summary: the study.
        config: its settings, shown in full.
        samples: outputs of the selected (else the last) adapter on the gate set. Never shown where
            ``config.evaluation.gate_data`` is private, even if given.
        round_samples: outputs of each round by ``round_index``, to unfold.

    Guarantees:
        Equal arguments give equal bytes. The page loads nothing and runs no script: its content policy
        forbids both, and every text is escaped.
    """
    domains = plots.domain_order(summary)
    return _template().render(
        summary=summary,
        config=config,
        head=view.headline(summary, config),
        budgets=view.budget_lines(summary),
        finals=view.final_rows(summary),
        history=view.gate_history(summary),
        metrics=words.METRICS,
        score_legend=plots.legend(domains, overall=True),
        domain_legend=plots.legend(domains, overall=False),
        utility=plots.utility_figures(summary) if summary.rounds else [],
        safety=plots.safety_figures(summary) if summary.rounds else [],
        privacy=[plots.noise_figure(summary), plots.epsilon_figure(summary)] if summary.rounds else [],
        cost=plots.cost_figures(summary) if summary.rounds else [],
        noise_lines=view.noise_lines(summary),
        plan_lines=view.plan_lines(summary, config),
        plan_columns=view.PLAN_COLUMNS,
        rounds=view.rounds(summary),
        client_columns=view.CLIENT_COLUMNS,
        sample_sets=view.sample_sets(summary, config, samples, round_samples),
        identities=view.identities(summary),
        settings=view.settings_yaml(config),
        show_bytes=words.show_bytes,
    )


def write_report(
    path: str | Path,
    summary: StudySummary,
    config: StudyConfig,
    samples: Sequence[Sample],
    *,
    round_samples: Mapping[int, Sequence[Sample]] | None = None,
) -> Path:
    """Write ``build_report`` to ``path``: the whole new file or, on any failure, the old one untouched."""
    path = Path(path)
    html = build_report(summary, config, samples, round_samples=round_samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(html)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


@cache
def _template() -> "Template":
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = files("fedmentor_core.report")
    names = ("report.html.j2", "style.css.j2")
    sources = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in names}
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
