"""What a server asks a site and what the site answers: the closed list of what crosses, both ways.

A request holds public numbers, digests and references: no path, no credential, and nothing of another domain. An
answer is one of ``DomainPlan``, ``ClientUpdate``, ``DomainEvaluation`` and ``SiteFailure``, with the digest of the
request it answers, so that an answer to another study, round, attempt or adapter is an answer to nothing.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from fedmentor_core.champion import Champion
from fedmentor_core.config import (
    AggregationConfig,
    AuditConfig,
    DomainConfig,
    ExecutionConfig,
    Name,
    StorageConfig,
    StudyConfig,
    TrackingConfig,
)
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.records import ArtifactRef, ClientAssignment, ClientUpdate, DomainEvaluation, DomainPlan, Record
from fedmentor_core.workspace import SITES_FOLDER

_RULES_TOLD = ("fedex", "svd")  # what a client reads or trains depends on them; on the server's step, a header's size
RUN_ID_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,100}$"


class _Request(Record):
    run_id: str = Field(pattern=RUN_ID_PATTERN, description="The study's run.")
    domain: Name = Field(description="Whose part is asked for.")
    config: StudyConfig = Field(description="The study, with this domain alone and without any place.")
    attempt: int = Field(default=0, ge=0, description="Grows when an earlier attempt was answered by a failure.")

    @property
    def sha256(self) -> str:
        """Digest of everything that is asked; an answer carries it."""
        return canonical_sha256(self.model_dump(mode="json"))

    @property
    def places_read(self) -> tuple[ArtifactRef, ...]:
        """What the site is to read from the study's store."""
        return ()

    @model_validator(mode="after")
    def _only_this_study(self) -> Self:
        if [domain.name for domain in self.config.domains] != [self.domain]:
            raise ValueError(f"config must hold the domain {self.domain!r} and no other")
        for ref in self.places_read:
            if not ref.key.startswith(f"runs/{self.run_id}/adapters/"):
                raise ValueError("an adapter that is not one of this run cannot be asked about")
        return self


class PlanRequest(_Request):
    """Ask for the domain's plan: its public numbers, under its own policy and ledger."""

    kind: Literal["plan"] = "plan"
    n_clients: int = Field(ge=1, description="Clients of the whole study.")


class TrainRequest(_Request):
    """Ask for one client's part of a round."""

    kind: Literal["train"] = "train"
    assignment: ClientAssignment
    frozen_adapter: ArtifactRef = Field(description="The adapter's frozen factors, the same for all clients.")

    @property
    def places_read(self) -> tuple[ArtifactRef, ...]:
        """The frozen factors and the global adapter."""
        return (self.frozen_adapter, self.assignment.global_adapter)

    @model_validator(mode="after")
    def _same_assignment(self) -> Self:
        if (self.assignment.run_id, self.assignment.domain) != (self.run_id, self.domain):
            raise ValueError("the assignment is another run's or another domain's")
        return self


class EvaluateRequest(_Request):
    """Ask for an adapter's metrics on the domain's gate or test set; those of a private set come noised and charged."""

    kind: Literal["evaluate"] = "evaluate"
    adapter: ArtifactRef
    split: Literal["gate", "test"]
    frozen_adapter: ArtifactRef
    champion: Champion | None = Field(default=None, description="Set when ``adapter`` is the champion's.")

    @property
    def places_read(self) -> tuple[ArtifactRef, ...]:
        """The frozen factors and the adapter to be evaluated."""
        return (self.frozen_adapter, self.adapter)


SiteRequest = Annotated[PlanRequest | TrainRequest | EvaluateRequest, Field(discriminator="kind")]


class SiteFailure(Record):
    """A request that a site could not carry out; what it says is safe to be shown anywhere."""

    kind: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,80}$", description="Class of what was raised.")
    reason: str = Field(max_length=2000)


Result = DomainPlan | ClientUpdate | DomainEvaluation | SiteFailure


class Answer(Record):
    """What a site signs."""

    version: Literal[1] = 1
    site: Name
    request_sha256: str
    result: Result


class SignedAnswer(Record):
    """An answer as it lies in the study's store."""

    answer: Answer
    signature: str = Field(pattern=r"^[0-9a-f]{128}$", description="Ed25519, in hex digits.")


def parse_request(value: object) -> PlanRequest | TrainRequest | EvaluateRequest:
    """A request from plain JSON values.

    Raises:
        pydantic.ValidationError: it is none.
    """
    made: PlanRequest | TrainRequest | EvaluateRequest = TypeAdapter(SiteRequest).validate_python(value)
    return made


def told_to_site(config: StudyConfig, domain: DomainConfig) -> StudyConfig:
    """What a site is told of a study: what it needs for its own domain, and no place, account or other domain."""
    assert domain.site is not None
    thresholds = (
        one if one.scope in ("overall", "each", domain.name) else one.model_copy(update={"scope": "each"})
        for one in config.evaluation.thresholds
    )
    evaluation = config.evaluation
    return config.model_copy(
        update={
            "domains": (domain,),
            "sites": {domain.site: config.sites[domain.site].model_copy(update={"store_url": None})},
            "data": config.data.model_copy(update={"root": None}),
            "privacy": config.privacy.model_copy(update={"ledger_url": None}),
            "evaluation": evaluation.model_copy(
                update={
                    "thresholds": tuple(thresholds),
                    "bertscore": evaluation.bertscore.model_copy(update={"folder": None}),
                    "toxicity": evaluation.toxicity.model_copy(update={"folder": None}),
                    "safety_prompts": None,  # answered on the server's machine
                }
            ),
            "adapter": config.adapter.model_copy(update={"start_from": None}),
            "aggregation": AggregationConfig(
                rule=config.aggregation.rule if config.aggregation.rule in _RULES_TOLD else "fedavg",
                prox_mu=config.aggregation.prox_mu,
                server=config.aggregation.server,
            ),
            "storage": StorageConfig(),
            "tracking": TrackingConfig(reference_run_id=config.tracking.reference_run_id),
            "audit": AuditConfig(),
            "execution": ExecutionConfig(),
        }
    )


def folder_of(site: str, domain: str, run_id: str) -> str:
    """Where a site writes for one domain of one run, in its own store or the study's: nowhere else."""
    return f"{SITES_FOLDER}/{site}/{domain}/runs/{run_id}"


def answer_key(site: str, request: PlanRequest | TrainRequest | EvaluateRequest) -> str:
    """Store key of the answer to ``request``."""
    return f"{folder_of(site, request.domain, request.run_id)}/answers/{request.kind}-{request.sha256}.json"
