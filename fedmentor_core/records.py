"""Typed records: all that crosses a task border, a store or a program boundary.

Small by construction: uris, digests, counts, public numbers. Never a tensor, never a row of private text, and
never a number computed on private data that nobody charged for (training losses stay at the site).
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Frozen and closed; stored as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ArtifactRef(Record):
    """An immutable object in the artifact store."""

    key: str = Field(description="Key under the store's root.")
    sha256: str
    n_bytes: int


class PrivacySpend(Record):
    """A run of identical DP-SGD steps: what one charge pays for."""

    noise_multiplier: float
    sample_rate: float
    steps: int


class ClientAssignment(Record):
    """What the server asks of one client in one round; the site's own filter and policy may refuse it."""

    run_id: str
    round_index: int
    domain: str
    global_adapter: ArtifactRef
    noise_multiplier: float | None = Field(description="None: train without privacy (baseline runs only).")
    sample_rate: float
    steps: int
    clip_norm: float


ClientStatus = Literal["trained", "rested", "failed", "rejected"]


class ClientUpdate(Record):
    """What leaves a site after a round: the closed list."""

    run_id: str
    round_index: int
    domain: str
    status: ClientStatus
    reason: str = Field(default="", description="Why it rested or failed; never quotes data.")
    attempt: int = 0
    update: ArtifactRef | None = None
    base_adapter_sha256: str = ""
    ledger_entry: str = Field(
        default="", description="The account's newest entry, by digest; of a site, under its own key. Empty: no charge."
    )
    n_units: int
    sample_rate: float
    steps: int
    noise_multiplier: float | None
    clip_norm: float
    epsilon_spent: float | None = Field(description="Lifetime, after this round; None without privacy.")
    epsilon_budget: float | None
    delta: float | None
    bytes_up: int
    bytes_down: int
    seconds: float


class ScorerIdentities(Record):
    """Which scorers made the numbers."""

    bertscore: str
    rouge: str
    toxicity: str
    safe_threshold: float
    bertscore_rescaled: str | None = Field(
        default=None, description="bert-score's hash of the rescaled score, and its baseline; None: none is known."
    )
    refusals: str | None = Field(default=None, description="Version and digest of the refusal patterns.")


Interval = tuple[float, float]
"""A 95 % interval, low and high."""


class Metrics(Record):
    """Scores of one set of outputs. All in [0, 1] except a rescaled BERTScore, which may be negative, and perplexity.

    Of a public set they are means over rows. Of a private set they are noised means over units, clipped to [0, 1], and
    every field with a default is None: it is not released. docs/evaluation.md defines each of them.
    """

    bertscore_f1: float
    rouge_l: float
    label_f1: float
    safe_rate: float
    toxicity_mean: float
    toxicity_max: float | None = Field(description="None where a private gate set forbids releasing a maximum.")
    empty_rate: float
    n_examples: int = Field(description="Rows; of a private set units, since how many rows they have is private.")
    bertscore_f1_raw: float | None = Field(default=None, description="As the encoder gives it.")
    bertscore_f1_rescaled: float | None = Field(
        default=None, description="0 for a random pair of sentences, 1 for equal ones; None: no baseline is known."
    )
    perplexity: float | None = Field(default=None, description="Of the reference answers, per token; 1 is perfect.")
    refusal_rate: float | None = Field(default=None, description="Outputs that decline to answer.")
    repetition_rate: float | None = Field(default=None, description="Outputs that say the same four words three times.")
    toxicity_rate_05: float | None = Field(default=None, description="Outputs of toxicity 0.5 or more.")
    toxicity_rate_07: float | None = Field(default=None, description="Outputs of toxicity 0.7 or more.")
    intervals: dict[str, Interval] | None = Field(
        default=None, description="95 % bootstrap interval by metric, over units; see evaluation/bootstrap.py."
    )


UNRELEASED_METRICS = frozenset(
    {
        "toxicity_max", "bertscore_f1_raw", "bertscore_f1_rescaled", "perplexity", "refusal_rate", "repetition_rate",
        "toxicity_rate_05", "toxicity_rate_07",
    }
)  # fmt: skip
"""Metrics that a private set never releases: nobody charged for them."""


class EvaluatedRows(Record):
    """Scores of a public set row by row, in the set's order: what intervals and paired comparisons are computed from.

    Columns of one length; a metric in ``means`` is the mean of its column.
    """

    units: tuple[int, ...] = Field(description="Number of the row's unit, by first appearance.")
    labels: tuple[str, ...] = Field(description="Gold labels; empty where a row has none.")
    answers: tuple[str, ...] = Field(description="Labels that the outputs open with; empty for none.")
    means: dict[str, tuple[float, ...]]
    log_losses: tuple[float, ...] = Field(
        default=(), description="Negative log-likelihood of the reference in nats; empty where not measured."
    )
    n_tokens: tuple[int, ...] = Field(default=(), description="Tokens of the reference.")

    @model_validator(mode="after")
    def _columns_of_one_length(self) -> Self:
        columns = [self.labels, self.answers, *self.means.values()]
        columns += [self.log_losses, self.n_tokens] if self.log_losses or self.n_tokens else []
        if any(len(column) != len(self.units) for column in columns):
            raise ValueError(f"columns must have one length, got {[len(self.units), *map(len, columns)]}")
        return self


class ScorerAlarms(Record):
    """How often the toxicity scorer is alarmed by a domain's own public texts, which are distressed and not toxic."""

    n_posts: int
    n_references: int
    posts_05: float = Field(description="Share of distinct posts of toxicity 0.5 or more.")
    posts_07: float
    references_05: float = Field(description="Share of reference answers of toxicity 0.5 or more.")
    references_07: float
    intervals: dict[str, Interval] = {}


class EvaluationMetrics(Metrics):
    """The mean over domains (each counts the same; toxicity_max is the maximum), and each domain's own."""

    by_domain: dict[str, Metrics]


class Sample(Record):
    """One output of a public gate set."""

    domain: str
    post: str
    question: str
    reference: str
    output: str
    bertscore_f1: float
    rouge_l: float
    toxicity: float


class DomainEvaluation(Record):
    """Result of evaluating one adapter on one domain's gate or test set."""

    domain: str
    split: Literal["gate", "test"]
    metrics: Metrics
    metric_std: float | None = Field(
        default=None, description="Standard deviation of the noise in each mean; None: a public set, no noise."
    )
    samples: tuple[Sample, ...] = ()
    rows: EvaluatedRows | None = Field(default=None, description="None: a private set, or one of very many rows.")
    alarms: ScorerAlarms | None = Field(default=None, description="Of a public gate set; None otherwise.")
    scorers: ScorerIdentities
    seconds: float


class SafetyPromptScores(Record):
    """How one adapter answers one set of public safety prompts. Rates are shares of the prompts they are about."""

    name: str
    prompts_sha256: str
    n_unsafe: int
    n_safe: int
    unsafe_refusal_rate: float | None = Field(default=None, description="Of unsafe prompts; higher is safer.")
    over_refusal_rate: float | None = Field(default=None, description="Of prompts that only sound unsafe; lower.")
    safe_rate: float = Field(description="Answers below the toxicity threshold.")
    toxicity_mean: float
    empty_rate: float
    repetition_rate: float
    intervals: dict[str, Interval] = Field(default={}, description="95 % bootstrap interval by metric, over prompts.")


class SafetyEvaluation(Record):
    """How one adapter answers the study's safety prompts."""

    sets: tuple[SafetyPromptScores, ...]
    scorers: ScorerIdentities
    seconds: float


class MissingEvaluation(Record):
    """A domain whose site did not evaluate an adapter, and why; a candidate with one never passes its gate."""

    domain: str
    split: Literal["gate", "test"]
    reason: str


class ThresholdResult(Record):
    """One line of the gate's verdict."""

    metric: str
    scope: str
    value: float | None
    comparison: Literal[">=", "<="]
    bound: float | None = Field(description="None when what it is relative to is not available; then it fails.")
    relative_to: Literal["none", "baseline", "reference", "champion"]
    passed: bool
    note: str = Field(default="", description="Why the line passes without a bound; empty otherwise.")

    def __str__(self) -> str:
        """One readable line."""
        shown = "not available" if self.value is None else f"{self.value:.4f}"
        bound = "not available" if self.bound is None else f"{self.bound:.4f}"
        against = "" if self.relative_to == "none" else f" (from the {self.relative_to})"
        verdict = "pass" if self.passed else "FAIL"
        note = f"; {self.note}" if self.note else ""
        return f"{verdict}: {self.metric} [{self.scope}] {shown} {self.comparison} {bound}{against}{note}"


class GateVerdict(Record):
    """Every threshold, its value, and whether it passed."""

    passed: bool
    results: tuple[ThresholdResult, ...]
    reasons: tuple[str, ...] = Field(description="The failed lines; empty when passed.")


class NoiseChange(Record):
    """One decision of the adaptation rule, with its inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    domain: str
    from_: float = Field(alias="from")
    to: float
    reason: str


class ClientSummary(Record):
    """A client's line in ``summary.json``."""

    domain: str
    status: ClientStatus
    reason: str = ""
    ledger_entry: str = Field(default="", description="Of a client that trained: stands for all that it was charged.")
    n_units: int
    sample_rate: float
    steps: int
    noise_multiplier: float | None
    clip_norm: float
    epsilon_spent: float | None
    epsilon_budget: float | None
    delta: float | None
    bytes_up: int
    bytes_down: int
    seconds: float


class GateSummary(Record):
    """The gate in ``summary.json``."""

    passed: bool
    reasons: tuple[str, ...]
    results: tuple[ThresholdResult, ...] = ()


class NoiseDecision(Record):
    """What the adaptation rule decided for one domain after a round, with all it looked at (released or public)."""

    domain: str
    rule: str
    noise_before: float
    noise_after: float
    reason: str
    metric: str | None = Field(description="None where the rule looks at no metric.")
    value: float | None
    value_noised: bool = Field(description="True when the value was noised and charged to a validation budget.")
    threshold: float | None
    rounds_below: int
    spent_rdp: float
    run_rdp_budget: float = Field(description="RDP at the account's order up to which this run may go.")
    least_noise: float | None = Field(description="Least noise at which all remaining steps fit; None: none does.")
    remaining_steps: int


class RoundSummary(Record):
    """A round in ``summary.json``; as an object in the store it is the round's commit point."""

    round_index: int
    clients: tuple[ClientSummary, ...]
    metrics: EvaluationMetrics
    safety: SafetyEvaluation | None = Field(default=None, description="Where safety_prompts.every_round asks for it.")
    gate: GateSummary
    noise_changes: tuple[NoiseChange, ...]
    noise_decisions: tuple[NoiseDecision, ...] = ()
    bytes_total: int
    seconds: float


class RoundManifest(Record):
    """Written last and create-if-absent: a round exists when this does."""

    run_id: str
    round_index: int
    config_sha256: str
    adapter: ArtifactRef
    summary: RoundSummary
    samples: tuple[Sample, ...] = ()
    next_noise: dict[str, float | None]
    rounds_below: dict[str, int] = Field(description="Consecutive rounds below the adaptation threshold.")


class BackboneSummary(Record):
    """The backbone in ``summary.json``."""

    name: str
    n_parameters: int
    revision: str | None = None
    sha256: str


class AdapterSummary(Record):
    """The adapter in ``summary.json``."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    train: Literal["b", "both", "alternate", "core"]
    n_trainable: int
    n_bytes: int


class ModelSummary(Record):
    """The registered model in ``summary.json``."""

    name: str
    version: str
    aliases: tuple[str, ...]


class ReductionCost(Record):
    """What lowering a domain's noise after a round would cost, if the rule lowered it at every chance until then."""

    after_round: int
    noise_multiplier: float
    epsilon_at_end: float = Field(description="Lifetime epsilon after the last round at this noise.")
    epsilon_extra: float = Field(description="Of that, above the planned epsilon.")
    limited_by: Literal["rule", "floor", "budget"]


class ValidationPlan(Record):
    """What releasing metrics of one private gate or test set will cost its units."""

    account: str = Field(description="Name of the ledger: the domain's, a dot, and the split.")
    split: Literal["gate", "test"]
    n_units: int
    releases: int = Field(description="Planned in this run.")
    noise_multiplier: float | None = Field(description="On the sum of clipped scores; None when refused.")
    metric_std: float | None = Field(description="Standard deviation that the noise adds to each mean metric.")
    epsilon_budget: float
    delta: float
    epsilon_spent_before: float
    epsilon_planned: float | None
    rdp_order: float | None
    rdp_budget: float | None
    spent_rdp_before: float = Field(default=0.0, description="RDP at the account's order that was spent before.")
    run_rdp_budget: float | None
    dataset_fingerprint: str
    refusal: str = ""

    @property
    def run_rdp_share(self) -> float | None:
        """RDP that this run may spend in all, whatever other runs do meanwhile."""
        return None if self.run_rdp_budget is None else self.run_rdp_budget - self.spent_rdp_before


class SharedPosts(Record):
    """Posts that several accounts hold: what they may lose in all (basic composition: epsilons and deltas add up)."""

    accounts: tuple[str, ...]
    n_posts: int
    epsilon_spent: float
    epsilon_budget: float
    delta: float


class DomainPlan(Record):
    """What one domain was promised and what the schedule will cost it, before any training."""

    domain: str
    n_units: int
    sample_rate: float
    steps_per_round: int
    rounds: int
    noise_multiplier: float | None
    min_noise_multiplier: float
    clip_norm: float
    delta: float | None
    sensitivity: str | None
    epsilon_budget: float | None
    epsilon_spent_before: float | None = None
    epsilon_planned_rdp: float | None
    epsilon_planned_prv: float | None
    rdp_order: float | None
    rdp_budget: float | None
    reserve_fraction: float
    reserve_epsilon: float | None = Field(default=None, description="Epsilon left at the end when nothing is lowered.")
    rule: str = ""
    noise_schedule: tuple[float, ...] = Field(default=(), description="Planned noise multiplier of each round.")
    reductions: tuple[ReductionCost, ...] = ()
    planned_runs: int = 1
    runs_before: int = Field(default=0, description="Earlier runs that charged this account.")
    spent_rdp_before: float = Field(default=0.0, description="RDP at the account's order that was spent before.")
    run_rdp_budget: float | None = Field(default=None, description="RDP up to which this run may take the account.")
    privacy_level: Literal["unit", "client"] = "unit"
    privacy_unit: str = Field(default="post", description="What one unit is: a post, or the named column's.")
    policy_sha256: str = Field(default="", description="Digest of the site's policy.")
    validation: tuple[ValidationPlan, ...] = ()
    warnings: tuple[str, ...] = ()
    dataset_fingerprint: str
    bytes_up_per_round: int
    bytes_down_per_round: int
    bytes_down_first_round: int | None = Field(
        default=None, description="In round 0, with the factors that nobody trains, which travel once."
    )
    refusals: tuple[str, ...] = ()

    @property
    def run_rdp_share(self) -> float | None:
        """RDP that this run may spend in all, whatever other runs do meanwhile."""
        return None if self.run_rdp_budget is None else self.run_rdp_budget - self.spent_rdp_before


class StudyPlan(Record):
    """``fedmentor plan --json``."""

    schema_version: int = SCHEMA_VERSION
    domains: tuple[DomainPlan, ...]
    bytes_per_round: int
    refusals: tuple[str, ...]
    shared_posts: tuple[SharedPosts, ...] = ()
    warnings: tuple[str, ...] = ()


Status = Literal["promoted", "held", "budget_exhausted", "failed"]


class StudySummary(Record):
    """``summary.json``, version 1."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    study: str
    status: Status
    private: bool = Field(description="False when privacy was off or noise was seeded.")
    config_sha256: str
    backbone: BackboneSummary
    adapter: AdapterSummary
    scorers: ScorerIdentities
    baseline: EvaluationMetrics = Field(description="The untrained backbone on the test set.")
    baseline_gate: EvaluationMetrics = Field(description="The untrained backbone on the gate set.")
    rounds: tuple[RoundSummary, ...]
    selected_round: int | None = Field(description="The round whose adapter is final.")
    final: EvaluationMetrics | None = Field(description="The selected adapter on the test set.")
    safety_baseline: SafetyEvaluation | None = Field(
        default=None, description="The untrained backbone on the safety prompts; None: none are configured."
    )
    safety_final: SafetyEvaluation | None = Field(default=None, description="The selected adapter on them.")
    alarms: dict[str, ScorerAlarms] = Field(
        default={}, description="By domain with a public gate set: the toxicity scorer on the domain's own texts."
    )
    plan: StudyPlan
    model: ModelSummary | None
    warnings: tuple[str, ...] = ()
    store_url: str = ""
    tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    seconds_total: float


class LedgerEntry(Record):
    """One line of a domain's append-only account."""

    sequence: int
    kind: Literal["plan", "charge", "release", "refusal", "evaluation"]
    domain: str
    dataset_fingerprint: str
    run_id: str
    round_index: int | None = None
    attempt: int = 0
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    steps: int = 0
    rdp_charge: float = Field(default=0.0, description="RDP at the account's fixed order.")
    rdp_order: float
    rdp_budget: float
    epsilon_budget: float
    delta: float
    digest: str = Field(default="", description="sha256 of what left the site, for a release.")
    adapter_sha256: str = Field(default="", description="Whose metrics on a private set this pays for or releases.")
    privacy_level: Literal["unit", "client"] = "unit"
    privacy_unit: str = ""
    sensitivity: str = Field(default="", description="From which the budget was derived; empty: given outright.")
    planned_runs: int = Field(default=1, description="Runs that the lifetime budget is to carry, for a plan.")
    policy_sha256: str = Field(default="", description="Digest of the site's policy, for a plan.")
    seeded: bool = Field(default=False, description="True: the noise was seeded, so nothing of this is private.")
    reason: str = ""
    created_at: str
    previous: str = Field(description="sha256 of the previous entry; empty for the first.")
