"""What an audit reports. Numbers about canaries and public schedules; no text, nobody's data."""

from typing import Literal

from pydantic import Field

from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.audit.probes import AuditCheck
from fedmentor_core.records import Record

AUDIT_SCHEMA_VERSION = 2


class Interval(Record):
    """A 95 % interval."""

    low: float
    high: float


class CurvePoint(Record):
    """The lower bound at one number of guesses, fixed in advance."""

    attack: Literal["loss", "gradient"]
    n_guesses: int
    n_correct: int
    epsilon: float


class RocPoint(Record):
    """Share of left-out (fpr) and of trained-on (tpr) canaries above a threshold."""

    attack: Literal["loss", "gradient"]
    fpr: float
    tpr: float


class DomainAudit(Record):
    """One domain's audit."""

    domain: str
    passed: bool
    n_units: int = Field(description="Training units, canaries included.")
    n_canaries: int
    n_included: int
    mean_draws: float = Field(description="How often a trained-on canary was in a batch, on average.")
    steps: int
    noise_multiplier: float = Field(description="The least that was used.")
    clip_norm: float
    delta: float
    epsilon_lower_bound: float = Field(description="Holds for all audited domains together, with the confidence.")
    epsilon_reachable: float = Field(description="The bound if every guess had been right.")
    epsilon_claimed: float = Field(description="What the ledger charged the audit's run.")
    epsilon_recomputed: float = Field(description="Of what was really done, by dp-accounting at the ledger's order.")
    epsilon_recomputed_pld: float = Field(description="The tight epsilon of the same, for comparison.")
    bound_curve: tuple[CurvePoint, ...]
    mia_auc: float = Field(description="Of the loss attack on all that left the site; so are TPR and exposure.")
    mia_auc_interval: Interval
    tpr_at_1pct_fpr: float
    tpr_at_1pct_fpr_interval: Interval
    tpr_at_01pct_fpr: float
    tpr_at_01pct_fpr_interval: Interval
    mia_auc_model: float = Field(description="The same attack on the aggregated adapter alone.")
    mia_auc_gradient: float = Field(description="Of the attack on every noised gradient, which nobody else sees.")
    mia_auc_gradient_interval: Interval
    exposure_mean: float = Field(description="Bits; about 1.44 for a canary that left no trace.")
    exposure_max: float
    exposure_limit: float
    roc: tuple[RocPoint, ...]
    checks: tuple[AuditCheck, ...]


class AuditReport(Record):
    """``fedmentor audit --json``. The flat figures are those of ``domain``, the one nearest to its claim."""

    schema_version: int = AUDIT_SCHEMA_VERSION
    study: str
    run_id: str
    passed: bool
    epsilon_lower_bound: float
    epsilon_claimed: float
    confidence: float
    mia_auc: float
    tpr_at_1pct_fpr: float
    n_canaries: int
    reasons: tuple[str, ...]
    domain: str
    domains: tuple[DomainAudit, ...]
    warnings: tuple[str, ...]
    data: Literal["invented", "own"] = Field(description="What it trained on beside canaries.")
    mechanism: Mechanism = Field(description="What was audited; a model made by another is none of its business.")
    mechanism_sha256: str
    seconds: float

    @property
    def cost(self) -> str:
        """What the audit cost the people in the data, in one sentence."""
        if self.data == "invented":
            return "The audit trained on canaries and invented posts only: it read nobody's text and cost no budget."
        spent = ", ".join(f"{one.domain} {one.epsilon_claimed:.3f}" for one in self.domains)
        return (
            "The audit trained on the domains' own posts and charged their lifetime accounts as any run does (epsilon "
            f"of this run alone: {spent}; domains without canaries were charged too). Keep its folder at the site."
        )
