"""Numbers and states as a reader should see them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, floor, log10
from typing import Literal

from fedmentor_core.config import StudyConfig
from fedmentor_core.records import Metrics, StudySummary

MINUS = "−"
NONE = "–"
NOT_PRIVATE = "NOT PRIVATE"
"""The mark of a study whose noise was off or seeded, wherever its numbers go."""


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """How one metric is named, shown and judged."""

    key: str
    label: str
    better: Literal["higher", "lower"]
    meaning: str
    percent: bool = False
    digits: int = 3

    def show(self, value: float | None) -> str:
        """``value`` in the metric's unit."""
        if value is None:
            return NONE
        if self.percent:
            return f"{number(100 * value, 1)} %"
        return number(value, self.digits)

    def show_difference(self, difference: float | None) -> str:
        """A signed difference in the metric's unit."""
        if difference is None:
            return ""
        text = number(100 * difference, 1) if self.percent else number(difference, self.digits)
        sign = "" if text.startswith(MINUS) else ("±" if float(text) == 0 else "+")
        return f"{sign}{text}{' points' if self.percent else ''}"

    def judge(self, difference: float | None) -> Literal["better", "worse", "same"]:
        """Whether a difference is an improvement, to the digits shown."""
        if difference is None:
            return "same"
        rounded = round(100 * difference, 1) if self.percent else round(difference, self.digits)
        if rounded == 0:
            return "same"
        return "better" if (rounded > 0) == (self.better == "higher") else "worse"


METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("bertscore_f1", "BERTScore F1", "higher", "closeness in meaning to the reference answer"),
    MetricInfo("rouge_l", "ROUGE-L", "higher", "overlap in wording with the reference answer"),
    MetricInfo("label_f1", "Label F1", "higher", "correctness of the label in the answer"),
    MetricInfo("safe_rate", "Safe outputs", "higher", "share of outputs below the toxicity limit", True),
    MetricInfo("toxicity_mean", "Toxicity, mean", "lower", "average toxicity of the outputs", digits=4),
    MetricInfo("toxicity_max", "Toxicity, highest", "lower", "toxicity of the worst output"),
    MetricInfo("empty_rate", "Empty outputs", "lower", "share of outputs with no text", percent=True),
)
"""What every table of scores shows."""
MORE_METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("bertscore_f1_raw", "BERTScore F1, raw", "higher", "as the encoder gives it"),
    MetricInfo("bertscore_f1_rescaled", "BERTScore F1, rescaled", "higher", "0: like a random pair of sentences"),
    MetricInfo("perplexity", "Perplexity of references", "lower", "surprise at the reference answers, per token"),
    MetricInfo("refusal_rate", "Refusals", "lower", "share of outputs that decline to answer", percent=True),
    MetricInfo("repetition_rate", "Repetitions", "lower", "share of outputs that go round in circles", percent=True),
    MetricInfo("toxicity_rate_05", "Toxicity ≥ 0.5", "lower", "share of outputs of toxicity 0.5 or more", percent=True),
    MetricInfo("toxicity_rate_07", "Toxicity ≥ 0.7", "lower", "share of outputs of toxicity 0.7 or more", percent=True),
)
"""What is shown once, with its interval; never of a private set."""
METRIC = {info.key: info for info in (*METRICS, *MORE_METRICS)}


def number(value: float, digits: int) -> str:
    """Fixed decimals, a true minus sign, and no negative zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits without trailing zeros; large numbers stay whole."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    magnitude = floor(log10(abs(value)))
    if magnitude >= digits:
        return f"{value:,.0f}".replace("-", MINUS)
    if magnitude < -4:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    text = f"{value:.{digits - 1 - magnitude}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", MINUS)


def get(metrics: Metrics | None, key: str) -> float | None:
    """One metric, or None where it was not released."""
    value = getattr(metrics, key, None)
    return None if value is None else float(value)


def show_bytes(n_bytes: float) -> str:
    """Decimal units: 1 MB is a million bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{significant(n_bytes / size)} {unit}"
    return f"{int(n_bytes)} bytes"


def show_seconds(seconds: float) -> str:
    """A duration at the precision a person wants."""
    if seconds < 10:
        return f"{significant(seconds, 2)} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def join_and(items: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""


def count(n: int, noun: str, plural: str | None = None) -> str:
    """``1 round``, ``3 rounds``."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def round_offset(summary: StudySummary) -> int:
    """What to add to ``round_index`` so that the reader's first round is 1 (0 is the untrained model)."""
    return 1 if summary.rounds and min(r.round_index for r in summary.rounds) == 0 else 0


def privacy_verdict(summary: StudySummary, config: StudyConfig, doubts: Sequence[str] = ()) -> tuple[bool, str]:
    """Whether the study may be called private, and why; any doubt counts against it.

    ``doubts`` are further reasons against it, such as what the ledgers say.
    """
    reasons = []
    if config.privacy.mode == "none":
        reasons.append("privacy was switched off: the clients trained without noise")
    elif any(c.status == "trained" and c.epsilon_spent is None for r in summary.rounds for c in r.clients):
        reasons.append("a client trained with no privacy cost on record")
    if config.privacy.noise_seed is not None:
        reasons.append("the noise was seeded, so whoever knows the seed can take it away")
    reasons += doubts
    if not (summary.private and config.is_private) and not reasons:
        reasons.append("the study itself recorded that it was not private")
    if reasons:
        sentence = join_and(list(dict.fromkeys(reasons)))
        return False, sentence[0].upper() + sentence[1:] + "."
    if not any(c.status == "trained" for r in summary.rounds for c in r.clients):
        return True, "No client finished a round of training, so no update was released."
    return True, (
        "Every client trained with differential privacy: its updates were clipped and noised before they "
        "left it, and every step was charged to its budget."
    )


STATUS_WORDS: dict[str, tuple[str, str]] = {
    "promoted": ("Promoted", "The selected adapter passed every threshold of the gate."),
    "held": ("Held", "The gate said no, so nothing was promoted."),
    "budget_exhausted": (
        "Budget exhausted",
        "A privacy budget could not carry the study any further. No domain spent more than it was promised.",
    ),
    "failed": ("Failed", "The study stopped before it could finish. What it did until then is below."),
}


def promise(epsilon: float, delta: float | None, unit: str) -> str:
    """What an epsilon means, in one sentence that can be checked."""
    factor = exp(epsilon)
    if factor < 10:
        shown = number(factor, 1)
    elif factor < 1e6:
        shown = f"{ceil(factor / 10 ** floor(log10(factor) - 1)) * 10 ** floor(log10(factor) - 1):,.0f}"
    else:
        shown = f"e^{epsilon:g}"
    slack = "" if delta is None else f" (give or take a probability of {significant(delta, 2)})"
    return f"at most {shown} times as likely as if any one {unit} had not been in its data{slack}"


_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def hide_credentials(text: str) -> str:
    """Blank ``user:password@`` in URLs."""
    return _PASSWORD.sub("***", text)
