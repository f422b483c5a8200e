"""One validated ``StudyConfig``: everything a federated study does, and nothing it does not.

Every section is a frozen pydantic model, so the command line, ``prefect.yaml``, the Prefect UI form and the
tests share one schema. Importing this module loads neither torch nor datasets.

Paper: FedMentor (arXiv 2509.14275) fixes LoRA, a noise scale per client from its data's sensitivity, and a
server that lowers noise when utility drops. Ranks, clip norms, thresholds and schedules are our own choices.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from fedmentor_core.data.sources import DataConfig, Source
from fedmentor_core.errors import ConfigError
from fedmentor_core.evaluation.scorers_config import BertScoreConfig, ToxicityConfig
from fedmentor_core.records import UNRELEASED_METRICS
from fedmentor_core.wire.codecs import CodecName

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Sensitivity = Literal["low", "medium", "high"]
UTILITY_METRICS = ("bertscore_f1", "rouge_l", "label_f1")
SAFETY_METRICS = ("safe_rate", "toxicity_mean", "toxicity_max", "empty_rate")
TrainedFactors = Literal["b", "both", "alternate", "core"]
Metric = Literal[
    "bertscore_f1", "bertscore_f1_raw", "bertscore_f1_rescaled", "rouge_l", "label_f1", "perplexity", "safe_rate",
    "toxicity_mean", "toxicity_max", "toxicity_rate_05", "toxicity_rate_07", "refusal_rate", "repetition_rate",
    "empty_rate",
]  # fmt: skip


class Section(BaseModel):
    """Frozen, and closed to unknown keys: a typo is an error, never a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneConfig(Section):
    """The frozen language model that every client starts from."""

    name: str = Field(
        default="embedded",
        min_length=1,
        description="'embedded' (the small model shipped with FedMentor), a local folder, or a hub model id.",
    )
    revision: str | None = Field(default=None, description="Hub revision (commit) to pin.")
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="Expected digest of the weights; loading anything else is refused.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="Weights' dtype in memory.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="'auto' takes a GPU where there is one.")
    max_length: int = Field(
        default=192, ge=32, le=8192, description="Context in tokens; a longer post is cut, never the response."
    )


class AdapterConfig(Section):
    """LoRA. Under privacy the default is FFA-LoRA: A frozen and shared, B trained (arXiv 2403.12313).

    A study's rank is seldom above 64; a registered adapter that stands for a corrected base may have a large one.
    """

    rank: int = Field(default=8, ge=1, le=8192, description="LoRA rank r.")
    alpha: float = Field(default=16.0, gt=0, le=1024, description="LoRA scale numerator; scale = alpha / rank.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="'all-linear' or names of linear modules, such as [q_proj, v_proj]."
    )
    last_layers: int | None = Field(
        default=None,
        ge=1,
        description="Adapt only the last k layers: a shorter backward pass and less to noise; default: all.",
    )
    train: TrainedFactors = Field(
        default="b",
        description="What clients train and send. 'b': B alone (FFA-LoRA); 'both': A and B; 'alternate': B in even "
        "rounds and A in odd ones (RoLoRA); 'core': an r x r matrix between frozen A and B (Fed-SB). All but 'both' "
        "average exactly.",
    )
    core_init: Literal["random", "weights"] = Field(
        default="random",
        description="The frozen factors around a core: random orthonormal ones, or the main singular directions of "
        "each weight matrix.",
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of an adapter that all clients start from, in peft's layout. It must be public or have "
        "been released under privacy. Needs start_sha256.",
    )
    start_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Digest of its adapter_model.safetensors."
    )

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by: alpha / rank."""
        return self.alpha / self.rank

    @model_validator(mode="after")
    def _pinned_start(self) -> Self:
        if self.start_from is not None and self.start_sha256 is None:
            raise ValueError(
                "start_from needs start_sha256, the sha256 of its adapter_model.safetensors, so that all clients and "
                "every resume start from the same weights"
            )
        return self

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one module; use 'all-linear' for every linear layer")
        return value


class DomainConfig(Section):
    """One client: a domain's data and what it was promised.

    Either ``epsilon`` outright, or a ``sensitivity`` from which ``privacy.epsilon_by_sensitivity`` derives it.
    """

    name: Name = Field(description="Lower-case name, used in paths, tables and the ledger.")
    source: Source = Field(
        description="Where the domain's data comes from: kind invented (corpus, n_units); dreaddit, irf or multiwd "
        "(form); csv or jsonl (path, columns); hub (name, columns); or site, with 'site' below."
    )
    sensitivity: Sensitivity | None = Field(default=None, description="How sensitive the domain's text is.")
    epsilon: float | None = Field(default=None, gt=0, le=100, description="Lifetime budget; lower is more private.")
    delta: float | None = Field(
        default=None, gt=0, lt=0.1, description="Default: min(1e-5, 1 / (10 * training units))."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, le=1e4, description="Overrides privacy.clip_norm for this domain."
    )
    min_noise_multiplier: float = Field(
        default=0.3, ge=0, le=100, description="The site's floor: less noise than this is refused, whoever asks."
    )
    policy_file: str | None = Field(
        default=None,
        description="The site's own policy (YAML): budget, least noise, clip norm, sample rate, allowed backbones and "
        "adapters. It overrides whatever a study asks for. Default: a policy derived from this configuration.",
    )
    site: Name | None = Field(
        default=None,
        description="The site of 'sites' that holds the domain; with source.kind 'site', and only then.",
    )
    shares_posts_with: tuple[Name, ...] = Field(
        default=(),
        description="Domains outside this study whose accounts hold some of the same posts; acknowledges that such "
        "posts lose the epsilons of both.",
    )
    validation_epsilon: float | None = Field(
        default=None, gt=0, le=100, description="Overrides evaluation.private.epsilon for this domain."
    )
    rank: int | None = Field(
        default=None, ge=1, description="This client's own LoRA rank, below adapter.rank; needs a rule such as 'svd'."
    )

    @model_validator(mode="after")
    def _one_promise(self) -> Self:
        if (self.epsilon is None) == (self.sensitivity is None):
            raise ValueError(
                f"domain {self.name!r} must give exactly one of 'epsilon' and 'sensitivity' "
                f"(got epsilon={self.epsilon}, sensitivity={self.sensitivity})"
            )
        if (self.source.kind == "site") != (self.site is not None):
            raise ValueError(
                f"domain {self.name!r}: 'site' goes with source.kind 'site' (got site={self.site}, "
                f"source.kind={self.source.kind!r})"
            )
        if self.site is not None and self.policy_file is not None:
            raise ValueError(f"domain {self.name!r}: 'policy_file' belongs to the site's own file, not to the study")
        return self


class TrainingConfig(Section):
    """Local training of one client in one round."""

    steps_per_round: int = Field(default=12, ge=1, le=100_000, description="Optimiser steps a client takes a round.")
    batch_size: int = Field(
        default=64, ge=1, le=65_536, description="Expected units per step (Poisson: the real number varies)."
    )
    microbatch_size: int = Field(
        default=32, ge=1, le=65_536, description="Rows per forward pass; memory only, not the mechanism."
    )
    learning_rate: float = Field(default=5e-3, gt=0, le=10, description="Adam's step size.")
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    autocast: Literal["auto", "none", "bfloat16"] = Field(
        default="auto",
        description="Matrix products in bfloat16; 'auto': where the processor has it. Clipping and noise stay in fp32.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Recompute each block on the way back: far less memory at long sequences, about a third more time. "
        "The mechanism and its numbers are the same. On a CPU with glibc set MALLOC_MMAP_THRESHOLD_=8388608 as well: "
        "the process keeps what was freed otherwise.",
    )
    first_token_weight: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Share of a sequence's loss on its first target token, the one that says yes or no.",
    )
    max_target_tokens: int = Field(default=64, ge=4, le=4096, description="Longest response, in tokens.")
    rows_per_unit: Literal["one", "all"] = Field(
        default="one",
        description="'one': a sampled unit trains on one of its rows, drawn anew each step; "
        "'all': on all of them, clipped as one.",
    )
    deadline_seconds: float | None = Field(
        default=None, gt=0, description="Stops a client's step loop; its charge stands, nothing is released."
    )


class PrivacyConfig(Section):
    """Sample-level DP-SGD at the client; unit = a post (or the configured unit column)."""

    mode: Literal["dp", "none"] = Field(
        default="dp", description="'none' trains without privacy (a baseline) and marks every output so."
    )
    level: Literal["unit", "client"] = Field(
        default="unit",
        description="What is protected: one privacy unit (a post), or a client's whole dataset (output perturbation, "
        "which needs many clients and few parameters; the plan says when it cannot work).",
    )
    planned_runs: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Runs, such as nights, that each domain's lifetime budget is to carry; a run may spend its share.",
    )
    max_composed_epsilon: float | None = Field(
        default=None,
        gt=0,
        description="Refuse a study in which a post that several accounts hold could lose more than this in all.",
    )
    clip_norm: float = Field(default=1.0, gt=0, le=1e4, description="L2 clip over all adapter tensors jointly.")
    epsilon_by_sensitivity: dict[Sensitivity, float] = Field(
        default={"low": 8.0, "medium": 6.0, "high": 4.0},
        description="The documented policy from sensitivity to lifetime epsilon.",
    )
    reserve_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="Share of each budget kept back to pay for later noise reductions."
    )
    max_noise_multiplier: float = Field(
        default=20.0,
        gt=0,
        le=1e4,
        description="A plan that needs more noise than this is refused: it would teach nothing.",
    )
    noise_seed: int | None = Field(
        default=None, ge=0, description="TESTS ONLY: seeded noise is not private; the run is marked so everywhere."
    )
    ledger_url: str | None = Field(
        default=None,
        pattern=r"^(file:///|s3://).+",
        description="Where ledgers live across runs; default: the run's store.",
    )

    @field_validator("epsilon_by_sensitivity")
    @classmethod
    def _all_levels(cls, value: dict[Sensitivity, float]) -> dict[Sensitivity, float]:
        missing = {"low", "medium", "high"} - set(value)
        if missing:
            raise ValueError(f"must name low, medium and high; missing {sorted(missing)}")
        if not 0 < value["high"] <= value["medium"] <= value["low"] <= 100:
            raise ValueError("must satisfy 0 < high <= medium <= low <= 100: more sensitive means less epsilon")
        return value


class AdaptationConfig(Section):
    """The paper's rule, made valid: lower a domain's noise only inside what its filter still admits."""

    rule: str = Field(
        default="paper",
        pattern=r"^[a-z][a-z0-9_-]{0,40}$",
        description="'paper': lower noise after low utility; 'fixed': never change it; 'decreasing': a schedule "
        "planned at the start; 'spend-down': a decreasing schedule that low utility brings forward and that leaves "
        "nothing of the budget unused. Others: one file in fedmentor_core/privacy/rules, or an entry point.",
    )
    metric: Literal["bertscore_f1", "rouge_l", "label_f1"] = Field(
        default="bertscore_f1", description="The gate-set metric that is watched, per domain."
    )
    threshold: float = Field(default=0.5, ge=0, le=2, description="Below this the domain's noise may be lowered.")
    relative_to: Literal["none", "baseline", "reference"] = Field(
        default="none", description="'none': an absolute value; else threshold times that run's value."
    )
    patience_rounds: int = Field(default=1, ge=1, le=100, description="Rounds below threshold before acting.")
    gamma: float = Field(default=0.95, gt=0, lt=1, description="Noise multiplier is multiplied by this.")
    final_noise_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Planned schedules: the last round's noise multiplier as a share of the first round's.",
    )

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        from fedmentor_core.privacy.rules import find_rule  # rules are typed with this section

        try:
            return find_rule(value).name
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @property
    def watches_utility(self) -> bool:
        """Whether the rule looks at ``metric``."""
        from fedmentor_core.privacy.rules import find_rule

        return find_rule(self.rule).watches_utility


class AggregationConfig(Section):
    """How the server joins the clients' noised updates. It is post-processing, so nothing of it costs privacy."""

    rule: str = Field(
        default="fedavg",
        pattern=r"^[a-z][a-z0-9_-]{0,40}$",
        description="'fedavg': weighted mean of the trained factors; 'fedex': that, and what it misses of the mean "
        "product goes into the base; 'svd': best low rank of the mean product; 'trimmed-mean' and 'median': one "
        "poisoned client cannot move them far. Others: one file in fedmentor_core/aggregation, or an entry point.",
    )
    weights: Literal["uniform", "units", "noise-aware"] = Field(
        default="uniform",
        description="'units' weighs by the public number of training units; 'noise-aware' also by how little noise "
        "the client's public noise multiplier, clip norm, sample rate and steps put into its update.",
    )
    noise_penalty: float = Field(
        default=1.0, ge=0, le=1e6, description="'noise-aware': 0 is 'units'; large weighs by inverse variance."
    )
    trim_clients: int = Field(
        default=1, ge=1, le=10_000, description="'trimmed-mean': values cut at each end; as many poisoned are borne."
    )
    prox_mu: float = Field(
        default=0.0, ge=0, le=1e4, description="FedProx: local training is pulled towards the global adapter."
    )
    server: Literal["none", "momentum", "adam"] = Field(
        default="none", description="What the server does with the mean change of a round: take it, or step along it."
    )
    server_learning_rate: float | None = Field(
        default=None, gt=0, le=100, description="Default: 1 for 'momentum', 0.01 for 'adam'."
    )
    server_momentum: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean change (beta 1).")
    server_beta2: float = Field(default=0.99, ge=0, lt=1, description="'adam': decay of the mean squared change.")
    server_adaptivity: float = Field(
        default=1e-3, gt=0, le=1, description="'adam': added to the root mean square; tau of the FedOpt paper."
    )
    min_clients: int = Field(default=1, ge=1, le=100_000, description="Fewer usable updates stop the round.")
    max_update_norm: float = Field(
        default=1e4, gt=0, description="An update whose L2 distance from the global adapter exceeds this is rejected."
    )

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        from fedmentor_core.aggregation import find_rule  # rules are typed with this section

        try:
            return find_rule(value).name
        except ConfigError as error:
            raise ValueError(str(error)) from None


class WireConfig(Section):
    """How numbers are written to travel (docs/wire.md). Rounding what was noised and charged costs no privacy."""

    upload: CodecName = Field(
        default="fp32",
        description="A client's update: 'fp32' as it is; others round its change of the global adapter, up or down by "
        "coin, to 16, 8, 7, 6 or 4 bits a number. 'int6' with 'int7' down is a fifth of the bytes.",
    )
    download: CodecName = Field(
        default="fp32",
        description="The global adapter. Server and clients all go on from what it is read as, so nothing drifts.",
    )


class ThresholdConfig(Section):
    """One line of the gate: ``metric >= value`` (or ``<=``), absolute or against another run."""

    metric: Metric
    at_least: float | None = Field(default=None, description="Passes when the metric is >= this.")
    at_most: float | None = Field(default=None, description="Passes when the metric is <= this.")
    relative_to: Literal["none", "baseline", "reference", "champion"] = Field(
        default="none",
        description="'baseline': times the untrained backbone's value; 'reference': times the reference run's; "
        "'champion': times the current champion's on the same gate set (passes while there is none, and says so).",
    )
    offset: float = Field(default=0.0, description="Added to the bound after the multiplication.")
    scope: str = Field(default="overall", description="'overall', 'each' (every domain) or one domain's name.")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"threshold on {self.metric!r} must give exactly one of 'at_least' and 'at_most'")
        return self


class PrivateGateConfig(Section):
    """The validation budget: what releasing metrics of private gate and test sets may cost their units.

    Gate, test and training units are disjoint, so each set has a budget of its own and they do not add up.
    """

    epsilon: float = Field(default=2.0, gt=0, le=100, description="Lifetime budget of each domain's gate or test set.")
    delta: float | None = Field(default=None, gt=0, lt=0.1, description="Default: min(1e-5, 1 / (10 * units)).")


class SafetyPromptsConfig(Section):
    """Public prompts that a safe model refuses, or only sound so; answered by the untrained and the final model."""

    kinds: tuple[Literal["embedded", "simple_safety_tests", "xstest"], ...] = Field(
        default=("embedded",),
        min_length=1,
        description="'embedded': a few invented ones that ship with FedMentor; the others are files of 'folder'.",
    )
    folder: str | None = Field(
        default=None, min_length=1, description="Holds simple_safety_tests.csv and xstest_prompts.csv; "
        "default: the folder 'safety' in data.root."
    )  # fmt: skip
    max_prompts: int = Field(
        default=100, ge=1, le=100_000, description="Of each set, most unsafe and most safe prompts, spread evenly."
    )
    max_new_tokens: int = Field(default=48, ge=1, le=4096)
    every_round: bool = Field(default=False, description="Also each round's candidate; recorded, not judged.")

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names each set once")
        return value


class EvaluationConfig(Section):
    """Generation and scoring on the gate set (steers noise and promotion) and the test set (steers nothing)."""

    gate_data: Literal["public", "private"] = Field(
        description="Whose text the gate and test sets are. 'public': their metrics are free. 'private': they are "
        "noised and charged to a validation budget. Required: there is no silent third way."
    )
    private: PrivateGateConfig = PrivateGateConfig()
    max_gate_examples: int = Field(
        default=24, ge=1, le=100_000, description="Rows per domain, at most; of a private set, units."
    )
    max_test_examples: int = Field(
        default=48, ge=1, le=100_000, description="Rows per domain, at most; of a private set, units."
    )
    max_new_tokens: int = Field(default=48, ge=1, le=4096)
    batch_size: int = Field(default=32, ge=1, le=4096)
    samples_in_report: int = Field(default=3, ge=0, le=50, description="Outputs shown per domain (public gate only).")
    bertscore: BertScoreConfig = BertScoreConfig()
    toxicity: ToxicityConfig = ToxicityConfig()
    safety_prompts: SafetyPromptsConfig | None = Field(
        default=None, description="Prompts to refuse, and prompts not to; default: none are asked."
    )
    thresholds: tuple[ThresholdConfig, ...] = Field(
        default=(), description="The gate. Every one must pass for the adapter to be promoted."
    )


class StorageConfig(Section):
    """Artifacts: a local directory or an S3-compatible server. Credentials come from the environment."""

    url: str | None = Field(
        default=None,
        pattern=r"^(file:///|s3://).+",
        description="file:///path or s3://bucket/prefix; default: the folder 'store' in the output folder.",
    )
    endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^@]+$",
        description="S3-compatible endpoint; default: AWS_ENDPOINT_URL, else Amazon's. Holds no credentials.",
    )
    region: str = Field(default="us-east-1")
    addressing_style: Literal["path", "virtual", "auto"] = Field(default="path")
    checksum_mode: Literal["when_required", "when_supported"] = Field(
        default="when_required",
        description="Extra S3 checksums on each request; 'when_supported' suits Amazon's S3, not every other server.",
    )
    deadline_seconds: float = Field(
        default=120.0,
        gt=0,
        le=3600,
        description="Longest time that a failing S3 request is tried again; each part of a large object has its own.",
    )
    connect_timeout_seconds: float = Field(default=5.0, gt=0, le=300)
    read_timeout_seconds: float = Field(default=30.0, gt=0, le=3600, description="Longest silence of an S3 server.")
    multipart_threshold_bytes: int = Field(
        default=64 * 2**20, ge=5 * 2**20, le=5 * 2**30, description="A larger object is uploaded in parts."
    )
    multipart_part_bytes: int = Field(default=16 * 2**20, ge=5 * 2**20, le=2**30, description="Size of a part.")
    server_side_encryption: Literal["AES256", "aws:kms"] | None = Field(
        default=None, description="Asked of the S3 server for each object; default: the bucket's own setting."
    )
    kms_key_id: str | None = Field(default=None, min_length=1, description="Key for 'aws:kms'; default: the account's.")
    encryption_key_file: str | None = Field(
        default=None,
        min_length=1,
        description="Encrypt every object before it leaves this machine: a file (mode 0600) with one key of 64 hex "
        "digits a line. The first encrypts, all decrypt.",
    )

    @model_validator(mode="after")
    def _key_of_kms(self) -> Self:
        if self.kms_key_id is not None and self.server_side_encryption != "aws:kms":
            raise ValueError("kms_key_id is given, so server_side_encryption must be 'aws:kms'")
        return self


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = Field(default=True)
    uri: str | None = Field(
        default=None, description="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite in the output folder."
    )
    experiment: str = Field(default="fedmentor", min_length=1)
    registered_model: str = Field(default="fedmentor-adapter", min_length=1)
    reference_run_id: str | None = Field(
        default=None, description="MLflow run whose final gate metrics 'reference' thresholds compare with."
    )


class AuditConfig(Section):
    """An audit as a gate before promotion. It trains on invented text in place of the domains' own."""

    before_promotion: bool = Field(
        default=False, description="Audit this configuration after the gate passed; promote only when it passes too."
    )
    canaries: int = Field(default=200, ge=10, le=100_000, description="Canaries per audited domain.")


class ExecutionConfig(Section):
    """Where and how clients train: beside each other or apart, on this machine or on a Ray cluster."""

    max_parallel_clients: int = Field(
        default=1, ge=1, le=1024, description="Clients trained at the same time; on a Ray cluster its resources decide."
    )
    torch_threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads; default: all cores.")
    client_retries: int = Field(
        default=1, ge=0, le=20, description="Retries of a failed client; each new attempt is charged anew."
    )
    isolation: Literal["auto", "none", "process"] = Field(
        default="auto",
        description="'process': each client trains in a process of its own, which gives its memory back and is killed "
        "at training.deadline_seconds even when it hangs; 'auto': on GPUs; 'none': in this process.",
    )
    start_seconds: float = Field(
        default=900.0, gt=0, description="Longest time that a client's own process may take to load backbone and data."
    )
    slots_per_machine: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Clients that train at once on a machine without GPUs, over all studies there; default: no limit. "
        "On GPUs it is one client a GPU, always.",
    )
    slots_folder: str | None = Field(
        default=None,
        min_length=1,
        description="Lock files of GPUs and slots, the same folder for everybody on a machine; default: the folder "
        "'fedmentor-slots' for temporary files.",
    )
    overlap_rounds: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Train the next round while this one is evaluated, where adaptation.rule watches no utility and "
        "the gate set is public; not with sites. 'auto': on a Ray cluster or several GPUs; 'always': on one machine as "
        "well.",
    )
    gpu_limit: str | None = Field(
        default=None,
        min_length=1,
        description="A Prefect global concurrency limit that each client also holds while it trains, such as gpu-a; "
        "one that does not exist is an error.",
    )
    task_runner: Literal["threads", "ray"] = Field(
        default="threads", description="'threads': on this machine; 'ray': on the machines of a Ray cluster."
    )
    ray_address: str | None = Field(
        default=None,
        min_length=1,
        description="'auto' (the cluster that this machine belongs to), host:port or ray://host:port; default: a "
        "cluster of this machine alone, for as long as the study runs.",
    )
    gpus_per_client: int = Field(
        default=0, ge=0, le=1, description="GPUs that Ray gives each client, which can use one; 0: clients use the CPU."
    )
    cpus_per_client: int = Field(default=1, ge=1, le=1024, description="CPU cores that Ray sets aside for each client.")
    shared_folders: bool = Field(
        default=False,
        description="Says that every machine of the Ray cluster sees the study's folders under the same names, so that "
        "file:// stores may be used.",
    )

    @model_validator(mode="after")
    def _ray_or_not(self) -> Self:
        ours = ("ray_address", "gpus_per_client", "cpus_per_client", "shared_folders")
        given = [name for name in ours if getattr(self, name) != type(self).model_fields[name].default]
        if self.task_runner != "ray" and given:
            raise ValueError(f"{', '.join(given)}: of use on a Ray cluster only, so task_runner must be 'ray'")
        return self


class SiteConfig(Section):
    """A site as the server knows it: how it is asked and whose answers are believed. Nothing of its data."""

    public_key: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="Ed25519 key that the site's answers must be signed with; 'fedmentor site keygen' prints it.",
    )
    store_url: str | None = Field(
        default=None,
        pattern=r"^(file:///|s3://).+",
        description="The site's own store, which the server only reads; default: the site's folder in the study's.",
    )
    deployment: str | None = Field(
        default=None,
        pattern=r"^[^/]+/[^/]+$",
        description="Prefect deployment that the site's worker carries out; default: client-site/NAME.",
    )
    start_within_seconds: float = Field(
        default=600.0, gt=0, description="A request that no worker took up by then is withdrawn: the site is down."
    )
    deadline_seconds: float = Field(
        default=7200.0, gt=0, description="Longest wait for an answer; the round then goes on without the site."
    )
    poll_seconds: float = Field(default=2.0, ge=0.1, le=60, description="How often the server looks for an answer.")


class StudyConfig(Section):
    """A whole federated study."""

    name: Name = Field(description="The study's name.")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Data order, initial weights. Never DP noise.")
    rounds: int = Field(default=3, ge=1, le=10_000, description="Federated rounds.")
    start_from: Literal["backbone", "champion"] = Field(
        default="backbone",
        description="Round 0's adapter: a new one, or the registered model's champion (a new one while it has none).",
    )
    backbone: BackboneConfig = BackboneConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    domains: tuple[DomainConfig, ...] = Field(min_length=1, description="The clients.")
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    adaptation: AdaptationConfig = AdaptationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    wire: WireConfig = WireConfig()
    evaluation: EvaluationConfig
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    audit: AuditConfig = AuditConfig()
    execution: ExecutionConfig = ExecutionConfig()
    sites: dict[Name, SiteConfig] = Field(default={}, description="Sites that hold domains, by name.")

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        names = [domain.name for domain in self.domains]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"domains: names must differ; repeated: {repeated}")
        unknown = sorted({one.site for one in self.domains if one.site is not None} - set(self.sites))
        if unknown:
            raise ValueError(f"domains: no site {', '.join(unknown)} in 'sites' (there: {sorted(self.sites)})")
        if self.aggregation.min_clients > len(names):
            raise ValueError(
                f"aggregation.min_clients is {self.aggregation.min_clients} but there are only {len(names)} domains"
            )
        if self.training.max_target_tokens >= self.backbone.max_length:
            raise ValueError(
                f"training.max_target_tokens ({self.training.max_target_tokens}) must be below "
                f"backbone.max_length ({self.backbone.max_length}), or no room is left for the post"
            )
        if self.evaluation.max_new_tokens >= self.backbone.max_length:
            raise ValueError(
                f"evaluation.max_new_tokens ({self.evaluation.max_new_tokens}) must be below "
                f"backbone.max_length ({self.backbone.max_length})"
            )
        if self.audit.before_promotion and self.privacy.level == "client":
            raise ValueError(
                "audit.before_promotion: an audit checks what one unit was promised, and privacy.level is 'client'. "
                "Set it to false, or privacy.level to 'unit'"
            )
        self._check_aggregation()
        self._check_gate(names)
        self._check_ray()
        if self.needs_champion and not self.tracking.enabled:
            raise ValueError(
                "start_from or a threshold names the champion, which MLflow's registry knows: set tracking.enabled to "
                "true, or compare with 'baseline' and start from 'backbone'"
            )
        return self

    def _check_aggregation(self) -> None:
        from fedmentor_core.aggregation import find_rule

        aggregation, train = self.aggregation, self.adapter.train
        rule = find_rule(aggregation.rule)
        if train not in rule.trains:
            raise ValueError(
                f"aggregation.rule {rule.name!r} is for adapter.train {' or '.join(map(repr, sorted(rule.trains)))} "
                f"(got {train!r}, of which 'fedavg' is exact already)"
            )
        if aggregation.weights != "uniform" and not rule.weighs:
            raise ValueError(
                f"aggregation.rule {rule.name!r} counts every client the same, whatever it says of itself: set "
                f"aggregation.weights to 'uniform' (got {aggregation.weights!r})"
            )
        if aggregation.server != "none" and rule.joins_products:
            raise ValueError(
                f"aggregation.rule {rule.name!r} joins products, and a step along the change of their factors is not a "
                f"step along theirs: set aggregation.server to 'none' (got {aggregation.server!r}), or the rule to "
                "'fedavg'"
            )
        if (least := rule.least_clients(aggregation)) > len(self.domains):
            raise ValueError(
                f"aggregation.rule {rule.name!r} needs updates of at least {least} clients, and there are only "
                f"{len(self.domains)} domains"
            )
        if aggregation.weights == "noise-aware" and self.privacy.mode == "none":
            raise ValueError(
                "aggregation.weights 'noise-aware' weighs by noise, and privacy.mode 'none' has none: set it to 'units'"
            )
        if self.adapter.start_from is not None and self.start_from == "champion":
            raise ValueError("start_from is 'champion' and adapter.start_from names another start: leave one out")
        for domain in self.domains:
            if domain.rank is None:
                continue
            if not rule.fits_ranks:
                raise ValueError(
                    f"domain {domain.name!r} has a rank of its own, which aggregation.rule {rule.name!r} cannot join: "
                    "set the rule to 'svd', or leave the domain's rank out"
                )
            if domain.rank > self.adapter.rank:
                raise ValueError(
                    f"domain {domain.name!r}: rank {domain.rank} is above adapter.rank {self.adapter.rank}, the rank "
                    "of the global adapter"
                )

    def adapter_of(self, domain: str | None) -> AdapterConfig:
        """The adapter as a client trains it: of the client's own rank, at the study's scale; None: the global one."""
        rank = None if domain is None else self.domain(domain).rank
        if rank is None:
            return self.adapter
        return self.adapter.model_copy(update={"rank": rank, "alpha": self.adapter.scale * rank})

    def _check_gate(self, names: list[str]) -> None:
        prompts = self.evaluation.safety_prompts
        if prompts is not None and prompts.max_new_tokens >= self.backbone.max_length:
            raise ValueError(
                f"evaluation.safety_prompts.max_new_tokens ({prompts.max_new_tokens}) must be below "
                f"backbone.max_length ({self.backbone.max_length})"
            )
        if self.evaluation.gate_data == "private":
            withheld = sorted({one.metric for one in self.evaluation.thresholds} & UNRELEASED_METRICS)
            if withheld:
                why = ", because one record decides it" if withheld == ["toxicity_max"] else ""
                raise ValueError(
                    f"evaluation.thresholds: {', '.join(map(repr, withheld))} cannot be released from a private gate "
                    f"set{why}. Use toxicity_mean or safe_rate, bertscore_f1, rouge_l, label_f1 or empty_rate"
                )
        wants_reference = self.adaptation.watches_utility and self.adaptation.relative_to == "reference"
        for threshold in self.evaluation.thresholds:
            wants_reference |= threshold.relative_to == "reference"
            if threshold.scope not in ("overall", "each", *names):
                raise ValueError(
                    f"evaluation.thresholds: scope {threshold.scope!r} is neither 'overall', 'each' nor one of {names}"
                )
        if wants_reference and self.tracking.reference_run_id is None:
            raise ValueError("a threshold is relative to 'reference' but tracking.reference_run_id names no MLflow run")

    def _check_ray(self) -> None:
        execution = self.execution
        if execution.task_runner != "ray":
            return
        at_sites = [domain.name for domain in self.domains if domain.site is not None]
        if at_sites:
            raise ValueError(
                f"execution.task_runner is 'ray', and {', '.join(at_sites)} train at their sites, by their own "
                "workers. Set it to 'threads'"
            )
        if self.backbone.device == "cuda" and not execution.gpus_per_client:
            raise ValueError(
                "backbone.device is 'cuda' and execution.gpus_per_client is 0, so Ray would show the clients no GPU. "
                "Set it to 1"
            )
        if execution.ray_address is None or execution.shared_folders:
            return
        urls = {"storage.url": self.storage.url, "privacy.ledger_url": self.privacy.ledger_url or self.storage.url}
        folders = [name for name, url in urls.items() if url is None or url.startswith("file:")]
        if folders:
            raise ValueError(
                f"execution.ray_address names a cluster, whose machines may not see this one's folders: {folders[0]} "
                "must be an s3:// URL, or set execution.shared_folders to true if all of them see the same folders "
                "under the same names"
            )

    def epsilon_of(self, domain: DomainConfig) -> float:
        """Lifetime epsilon promised to ``domain``: given outright, or derived from its sensitivity."""
        if domain.epsilon is not None:
            return domain.epsilon
        assert domain.sensitivity is not None
        return self.privacy.epsilon_by_sensitivity[domain.sensitivity]

    def clip_norm_of(self, domain: DomainConfig) -> float:
        """The clip norm ``domain`` trains with."""
        return domain.clip_norm if domain.clip_norm is not None else self.privacy.clip_norm

    def domain(self, name: str) -> DomainConfig:
        """The domain called ``name``."""
        for domain in self.domains:
            if domain.name == name:
                return domain
        raise KeyError(name)

    @property
    def compares_with_champion(self) -> bool:
        """Whether a threshold refers to the champion."""
        return any(threshold.relative_to == "champion" for threshold in self.evaluation.thresholds)

    @property
    def needs_champion(self) -> bool:
        """Whether the study must know the champion before it starts."""
        return self.start_from == "champion" or self.compares_with_champion

    @property
    def is_private(self) -> bool:
        """False when noise is switched off or seeded."""
        return self.privacy.mode == "dp" and self.privacy.noise_seed is None
