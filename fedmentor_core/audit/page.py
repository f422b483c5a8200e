"""The audit as one HTML file, and the sentences that say what it can and cannot show."""

import math
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files

from fedmentor_core.audit.records import AuditReport, DomainAudit
from fedmentor_core.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

SHOWS = (
    "A failed audit is strong evidence of a fault: noise, clipping, sampling or the ledger is not what was claimed (a "
    "false alarm is rarer than one in a million for each exact check, at most one in twenty for the canaries' bound). "
    "A passed audit is no proof of privacy: the guarantee is the theorem behind the ledger, and the audit looks for "
    "code that does not do what the theorem assumes."
)
LIMITS = (
    "The one-run bound from canaries is a bug detector with little power: with every guess right it reaches only the "
    "value in the column 'reachable', and 8 would take about 8,900 canaries.",
    "The probes see the noised gradient of the production step itself, so they see missing, weak, skipped or repeated "
    "noise, a clip that does not bound, and sampling above the charged rate, each with a false alarm less than once "
    "in a million. They do not see noise that somebody can predict, or private data that leaves another way than by "
    "the update (logs, metrics, error messages).",
    "The probes call the training loop themselves. In the run, steps, draws, noise and the length of every step are "
    "watched; a clip norm that only the call from the round loosens shows there only if gradients exceed it.",
    "The ledger is counted again from what was done in the audit's own run; charges of earlier runs are not counted "
    "again.",
    "On invented data, canaries stand among exactly as many units as the study has, so the audited schedule is that of "
    "its first run; with the domains' own data they come on top, and the schedule is that of a slightly larger domain. "
    "What is audited is the code and the configuration, and not the adapter in the registry, which never saw a canary.",
)


def build_page(report: AuditReport) -> str:
    """The whole page. Equal reports give equal bytes; it loads nothing and runs no script."""
    verdict = "passed" if report.passed else "FAILED"
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report.reasons)
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    domains = "".join(_domain_section(one, slot, report.confidence) for slot, one in enumerate(report.domains))
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in LIMITS)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(report.study)}: audit {verdict} · FedMentor</title>
<style>
{_style()}
</style>
</head>
<body>
<header><div>
<p class="eyebrow">FedMentor privacy audit</p>
<div class="titleline">
<h1>{escape(report.study)}</h1>
<span class="pill {"good" if report.passed else "bad"}">{verdict}</span>
</div>
<p class="lead">{escape(SHOWS)}</p>
{f"<ul>{reasons}</ul>" if reasons else ""}
</div></header>
<main>
{domains}
{f'<section><h2>Warnings</h2><ul class="soft">{warnings}</ul></section>' if warnings else ""}
<section><h2>What this audit cannot see</h2><ul class="soft">{limits}</ul>
<p class="small soft">{escape(report.cost)}</p>
<p class="small soft">Run {escape(report.run_id)}, {report.seconds:.0f} s; mechanism
{report.mechanism_sha256[:16]}. Bounds hold for all audited domains
together with {report.confidence:.0%} confidence; intervals are 95 %.</p></section>
</main>
</body>
</html>
"""


def _domain_section(one: DomainAudit, slot: int, confidence: float) -> str:
    cards = (
        ("Claimed epsilon", f"{one.epsilon_claimed:.3f}", f"at delta {one.delta:.1e}, by the ledger"),
        ("Shown by canaries", f"≥ {one.epsilon_lower_bound:.3f}", f"reachable {one.epsilon_reachable:.2f}"),
        ("Counted again", f"{one.epsilon_recomputed:.3f}", f"tight (PLD) {one.epsilon_recomputed_pld:.3f}"),
        (
            "Attack AUC",
            f"{one.mia_auc:.3f}",
            f"{one.mia_auc_interval.low:.3f} to {one.mia_auc_interval.high:.3f}; 0.5 is chance",
        ),
        (
            "AUC with every gradient",
            f"{one.mia_auc_gradient:.3f}",
            f"{one.mia_auc_gradient_interval.low:.3f} to {one.mia_auc_gradient_interval.high:.3f}; nobody sees these",
        ),
        (
            "TPR at 1 % FPR",
            f"{one.tpr_at_1pct_fpr:.1%}",
            f"{one.tpr_at_1pct_fpr_interval.low:.1%} to {one.tpr_at_1pct_fpr_interval.high:.1%}",
        ),
        (
            "Exposure",
            f"{one.exposure_mean:.2f} bits",
            f"highest {one.exposure_max:.2f} of {one.exposure_limit:.2f}; 1.44 without a trace",
        ),
    )
    shown = "".join(
        f'<div class="card"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="under">{escape(under)}</div></div>'
        for name, value, under in cards
    )
    checks = "".join(
        f'<tr><th scope="row">{escape(check.name)}</th>'
        f'<td class="{"pass" if check.passed else "fail"}">{"pass" if check.passed else "FAIL"}</td>'
        f'<td class="text">{escape(check.detail)}</td>'
        f"<td>{'' if check.p_value is None else f'{check.p_value:.2g}'}</td></tr>"
        for check in one.checks
    )
    curve = "".join(
        f'<tr><th scope="row">{point.attack}</th><td>{point.n_guesses}</td><td>{point.n_correct}</td>'
        f"<td>{point.epsilon:.3f}</td></tr>"
        for point in one.bound_curve
    )
    return f"""<section>
<h2>{escape(one.domain)}</h2>
<p class="soft">{one.n_canaries} canaries among {one.n_units} units, {one.n_included} of them trained on, each in
{one.mean_draws:.1f} batches on average; {one.steps} steps at noise multiplier {one.noise_multiplier:.4g} and more,
clip norm {one.clip_norm:g}.</p>
<div class="cards">{shown}</div>
<div class="scroll"><table><caption>Checks</caption>
<thead><tr><th scope="col">check</th><th scope="col">verdict</th><th scope="col" class="text">what was found</th>
<th scope="col">p</th></tr></thead><tbody>{checks}</tbody></table></div>
<div class="figures two">
<figure><figcaption><strong>Telling canaries apart</strong><span>Line: the attack on all that left the site.
Dots: on every noised gradient. Dashed: chance, and the most that
({one.epsilon_claimed:.2f}, {one.delta:.0e})-DP allows.</span></figcaption>
{roc_chart(one, slot)}</figure>
<figure><figcaption><strong>Lower bound by number of guesses</strong><span>Fixed in advance; each at a tenth of the
error that {confidence:.0%} leaves to the domain.</span></figcaption>
<div class="scroll"><table><thead><tr><th scope="col">attack</th><th scope="col">guesses</th><th scope="col">right</th>
<th scope="col">epsilon at least</th></tr></thead><tbody>{curve}</tbody></table></div></figure>
</div>
</section>
"""


def roc_chart(one: DomainAudit, slot: int) -> str:
    """The attack's ROC curve below the bound of the claim: TPR <= e^eps FPR + delta, and the same for TNR."""
    alt = (
        f"ROC curve of the membership attack on {one.domain}: area {one.mia_auc:.2f}, against the bound of epsilon "
        f"{one.epsilon_claimed:.2f}"
    )
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(alt, quote=True)}">'
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="grid" d="M{LEFT:g} {_y(tick)}H{WIDTH - RIGHT:g}"/>')
        parts.append(f'<text class="ytick" x="{LEFT - 7:g}" y="{float(_y(tick)) + 4:g}">{tick:g}</text>')
        parts.append(f'<text class="xtick" x="{_x(tick)}" y="{HEIGHT - BOTTOM + 17:g}">{tick:g}</text>')
    parts.append(f'<text class="xname" x="{WIDTH - RIGHT:g}" y="{HEIGHT - 3:g}">false-positive rate</text>')
    grid = sorted({*(10 ** (-4 + 4 * i / 60) for i in range(61)), 0.0, 1.0})
    bound = [(fpr, allowed_tpr(fpr, one.epsilon_claimed, one.delta)) for fpr in grid]
    parts.append(f'<path class="bound" d="{_path(bound)}"/>')
    parts.append(f'<path class="bound" d="{_path([(0.0, 0.0), (1.0, 1.0)])}"/>')
    for attack, dash in (("loss", "d0"), ("gradient", "d2")):
        line = [(point.fpr, point.tpr) for point in one.roc if point.attack == attack]
        parts.append(f'<g class="c{slot % 6}"><path class="ln {dash}" d="{_path(line)}"/></g>')
    parts.append("</svg>")
    return "".join(parts)


def allowed_tpr(fpr: float, epsilon: float, delta: float) -> float:
    """The highest true-positive rate of any attack on an (epsilon, delta)-DP mechanism at ``fpr``."""
    up = math.exp(min(epsilon, 700.0)) * fpr + delta
    down = 1 - math.exp(-epsilon) * max(0.0, 1 - delta - fpr)
    return max(0.0, min(1.0, up, down))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_x(x)} {_y(y)}" for x, y in points)


def _x(share: float) -> str:
    return f"{LEFT + (WIDTH - LEFT - RIGHT) * share:.1f}"


def _y(share: float) -> str:
    return f"{TOP + (HEIGHT - TOP - BOTTOM) * (1 - share):.1f}"


@cache
def _style() -> str:
    return files("fedmentor_core.report").joinpath("style.css.j2").read_text(encoding="utf-8")
