"""The report: one HTML file that needs nothing else and asks nothing of the network."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fedmentor_core.config import StudyConfig
from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.records import Sample, StudySummary
from fedmentor_core.report import plots, privacy_plots, words
from fedmentor_core.report.sections import (
    headline,
    made,
    noise,
    promise,
    rounds,
    safety,
    sample_outputs,
    scores,
    validation,
)

if TYPE_CHECKING:
    from jinja2 import Template


def build_report(
    summary: StudySummary,
    config: StudyConfig,
    samples: Sequence[Sample],
    *,
    round_samples: Mapping[int, Sequence[Sample]] | None = None,
    accounts: Sequence[LedgerView] | None = None,
) -> str:
    """A whole study as one HTML page.

    Args:
        summary: the study.
        config: its settings, shown in full.
        samples: outputs of the selected (else the last) adapter on the gate set. Never shown where
            ``config.evaluation.gate_data`` is private, even if given.
        round_samples: outputs of each round by ``round_index``, to unfold.
        accounts: the ledgers as they were just read; None says in the report that they were not read.

    Guarantees:
        Equal arguments give equal bytes. The page loads nothing and runs no script: its content policy
        forbids both, and every text is escaped. A study that was not private says so in its title, in a band at the
        top, in its privacy part and in the picture and the words of every chart.
    """
    by_name = None if accounts is None else _of_study(summary, accounts)
    head = headline.headline(summary, config, list((by_name or {}).values()))
    domains = plots.domain_order(summary)

    def shown(figures: list[plots.Figure]) -> list[plots.Figure]:
        return figures if head.private else plots.marked(figures, words.NOT_PRIVATE)

    has_rounds = bool(summary.rounds)
    spending = [privacy_plots.noise_figure(summary), privacy_plots.epsilon_figure(summary)] if has_rounds else []
    return template("report.html.j2").render(
        summary=summary,
        config=config,
        not_private=words.NOT_PRIVATE,
        head=head,
        budgets=headline.budget_lines(summary),
        finals=headline.final_rows(summary),
        history=headline.gate_history(summary),
        details=scores.detail_rows(summary.final, summary.baseline),
        safety_view=safety.safety_view(summary),
        alarm_columns=safety.ALARM_COLUMNS,
        metrics=words.METRICS,
        score_legend=plots.legend(domains, overall=True),
        domain_legend=plots.legend(domains, overall=False),
        utility=shown(plots.utility_figures(summary)) if has_rounds else [],
        safety=shown(plots.safety_figures(summary)) if has_rounds else [],
        plan_figures=shown(privacy_plots.plan_figures(summary)),
        plan_legend=privacy_plots.plan_legend(summary),
        spending=shown(spending),
        cost=shown(plots.cost_figures(summary)) if has_rounds else [],
        promises=promise.promise_cards(summary, config, by_name, private=head.private),
        noise_lines=noise.noise_lines(summary),
        ladders=noise.ladders(summary),
        validation_lines=validation.validation_lines(summary.plan, by_name),
        validation_columns=validation.VALIDATION_COLUMNS,
        shared_lines=validation.shared_lines(summary.plan, by_name),
        rounds=rounds.rounds(summary),
        client_columns=rounds.CLIENT_COLUMNS,
        sample_sets=sample_outputs.sample_sets(summary, config, samples, round_samples),
        identities=made.identities(summary),
        settings=made.settings_yaml(config),
    )


def write_report(
    path: str | Path,
    summary: StudySummary,
    config: StudyConfig,
    samples: Sequence[Sample],
    *,
    round_samples: Mapping[int, Sequence[Sample]] | None = None,
    accounts: Sequence[LedgerView] | None = None,
) -> Path:
    """Write ``build_report`` to ``path``: the whole new file or, on any failure, the old one untouched."""
    path = Path(path)
    html = build_report(summary, config, samples, round_samples=round_samples, accounts=accounts)
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


def _of_study(summary: StudySummary, accounts: Sequence[LedgerView]) -> dict[str, LedgerView]:
    """The study's own accounts by name; a ledger may hold those of other studies too."""
    own = {plan.domain for plan in summary.plan.domains}
    own |= {one.account for plan in summary.plan.domains for one in plan.validation}
    return {account.domain: account for account in accounts if account.domain in own}


@cache
def template(name: str) -> "Template":
    """A page's template: every text put into it is escaped, and a missing value is an error."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = files("fedmentor_core.report")
    parts = ("macros.html.j2", "privacy.html.j2", "style.css.j2")
    sources = {part: folder.joinpath(part).read_text(encoding="utf-8") for part in (name, *parts)}
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
