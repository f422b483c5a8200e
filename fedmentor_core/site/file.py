"""A site's own file: where its data, policies, ledger and signing key are. Only its worker is told where the file is.

A study's configuration, as the server holds it, says of a domain no more than ``source: {kind: site}`` and the site's
name. The site completes it from this file, and what the file says comes first: source and unit of the data, policy,
ledger, digest key, whether gate data is private, deadline, device.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedmentor_core.config import DomainConfig, ExecutionConfig, Name, Section, StorageConfig, StudyConfig
from fedmentor_core.config_io import explain, read_mapping
from fedmentor_core.data.sources import DataConfig, LocalSource
from fedmentor_core.errors import ConfigError, FedMentorError
from fedmentor_core.evaluation.scorers_config import BertScoreConfig, Sha256, ToxicityConfig

VARIABLE = "FEDMENTOR_SITE_FILE"
"""Environment variable of a site's worker that names the file."""

_NAME_OF_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
EXAMPLE = "infra/sites/site_example.yaml"


class RequestRefusedError(FedMentorError):
    """What a site will not do, whoever asks; the message may be told to the server."""


class SiteDomain(Section):
    """One domain that a site holds."""

    source: LocalSource = Field(description="Where the rows are, at this site.")
    data_root: str | None = Field(default=None, description="Folder that relative paths of the source start at.")
    policy_file: str = Field(description="The site's policy for this domain: budget, least noise, backbones.")
    gate_data: Literal["public", "private"] = Field(
        default="private",
        description="Whether gate and test posts are private. A study that takes private ones for public is refused: "
        "it would publish posts.",
    )
    shares_posts_with: tuple[Name, ...] = Field(
        default=(), description="Accounts of this site that hold some of the same posts; see the privacy guide."
    )


class SiteScorer(Section):
    """A scorer's model on a site's machine."""

    folder: str = Field(description="Its folder: as for 'model' in the study's evaluation section.")
    sha256: Sha256 = Field(
        description="Digest of its weights (model.safetensors, or the one .ckpt); nothing else is ever scored with."
    )


class SiteFile(Section):
    """What a site's worker knows and no server is told. Relative paths start at the file's folder."""

    site: Name = Field(description="The site's name, as in the study's 'sites'.")
    store: StorageConfig = Field(description="The study's store as this site reaches it; 'url' is required.")
    own_store: StorageConfig | None = Field(
        default=None, description="A store of the site's own to write to ('url' is required), which the server reads."
    )
    ledger_url: str = Field(
        pattern=r"^(file:///|s3://).+",
        description="The site's own place for its ledgers, never below the store's URL; without a scheme: a folder.",
    )
    signing_key_file: str = Field(description="Ed25519 private key, mode 0600; see 'fedmentor site keygen'.")
    domains: dict[Name, SiteDomain] = Field(min_length=1)
    digest_key_variable: str = Field(default="FEDMENTOR_UNIT_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    backbones: dict[str, str] = Field(
        default={}, description="Folders of backbones on this machine, by the name a study gives them."
    )
    scorers: dict[str, SiteScorer] = Field(
        default={}, description="Models of BERTScore and toxicity on this machine, by the name a study gives them."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto")
    torch_threads: int | None = Field(default=None, ge=1, le=1024)
    deadline_seconds: float | None = Field(default=None, gt=0, description="Longest step loop; the study's if shorter.")
    max_composed_epsilon: float | None = Field(
        default=None, gt=0, description="Most that a post of several accounts may lose; the study's limit if lower."
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        for name, store in (("store", self.store), ("own_store", self.own_store)):
            if store is None:
                continue
            if store.url is None:
                raise ValueError(f"{name}.url is required")
            if f"{self.ledger_url.rstrip('/')}/".startswith(f"{store.url.rstrip('/')}/"):
                raise ValueError(f"ledger_url must be a place that the site alone reads, not below {name}.url")
        return self

    @property
    def written(self) -> StorageConfig:
        """The store that the site writes to."""
        return self.own_store or self.store


def load_site_file(path: str | Path) -> SiteFile:
    """Read and validate a site's file; its relative paths are made absolute.

    Raises:
        ConfigError: missing, unreadable or not valid.
    """
    raw = read_mapping(path, "site file", example=EXAMPLE)
    folder = Path(path).resolve().parent
    ledger = raw.get("ledger_url")
    if isinstance(ledger, str) and "://" not in ledger:
        raw["ledger_url"] = (folder / ledger).resolve().as_uri()
    try:
        found = SiteFile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path} is not a valid site file:\n" + "\n".join(explain(error, SiteFile))) from None
    domains = {
        name: one.model_copy(
            update={
                "policy_file": str(folder / one.policy_file),
                "data_root": str(folder / one.data_root) if one.data_root is not None else str(folder),
            }
        )
        for name, one in found.domains.items()
    }
    return found.model_copy(
        update={
            "domains": domains,
            "signing_key_file": str(folder / found.signing_key_file),
            "backbones": {name: str(folder / place) for name, place in found.backbones.items()},
            "scorers": {
                name: one.model_copy(update={"folder": str(folder / one.folder)}) for name, one in found.scorers.items()
            },
        }
    )


def site_file_of_environment(environment: Mapping[str, str] = os.environ) -> SiteFile:
    """The site's file that this process is told of.

    Raises:
        ConfigError: it is told of none: this is not a site's worker.
    """
    path = environment.get(VARIABLE)
    if not path:
        raise ConfigError(
            f"the environment variable {VARIABLE} is not set, so this process belongs to no site. Set it, for the "
            "site's worker only, to the site's file."
        )
    return load_site_file(path)


def at_site(config: StudyConfig, file: SiteFile) -> StudyConfig:
    """The study as the site carries it out: the server's wishes, completed and corrected by the site's file.

    Raises:
        RequestRefusedError: another site's domain, or private gate posts taken for public ones.
    """
    asked = config.domains[0]
    if asked.site != file.site or asked.name not in file.domains:
        raise RequestRefusedError(f"site {file.site!r} does not hold domain {asked.name!r} for site {asked.site!r}.")
    own = file.domains[asked.name]
    if config.evaluation.gate_data == "public" and own.gate_data == "private":
        raise RequestRefusedError(
            f"domain {asked.name!r}: its gate and test posts are private, and the study takes them for public. Set "
            "evaluation.gate_data to 'private'."
        )
    domain = DomainConfig.model_validate(
        asked.model_dump()
        | {
            "source": own.source.model_dump(),
            "site": None,
            "policy_file": own.policy_file,
            "shares_posts_with": own.shares_posts_with,
        }
    )
    backbone = config.backbone
    evaluation = config.evaluation
    return config.model_copy(
        update={
            "domains": (domain,),
            "sites": {},
            "backbone": backbone.model_copy(
                update={"name": file.backbones.get(backbone.name, backbone.name), "device": file.device}
            ),
            "data": DataConfig.model_validate(
                config.data.model_dump() | {"root": own.data_root, "digest_key_variable": file.digest_key_variable}
            ),
            "training": config.training.model_copy(
                update={"deadline_seconds": _least(config.training.deadline_seconds, file.deadline_seconds)}
            ),
            "privacy": config.privacy.model_copy(
                update={
                    "ledger_url": file.ledger_url,
                    "max_composed_epsilon": _least(config.privacy.max_composed_epsilon, file.max_composed_epsilon),
                }
            ),
            "evaluation": evaluation.model_copy(
                update={
                    "bertscore": evaluation.bertscore.model_copy(update=_scorer_here(evaluation.bertscore, file)),
                    "toxicity": evaluation.toxicity.model_copy(update=_scorer_here(evaluation.toxicity, file)),
                }
            ),
            "storage": file.written,
            "execution": ExecutionConfig(torch_threads=file.torch_threads),
        }
    )


def _scorer_here(asked: BertScoreConfig | ToxicityConfig, file: SiteFile) -> dict[str, object]:
    """Where a scorer is on this machine, as the site's file says. No server says which pickles may be opened.

    Raises:
        RequestRefusedError: the site has the model with other weights than the study asks for, or the study names a
            folder of this machine.
    """
    own = file.scorers.get(asked.model)
    pickles: dict[str, object] = {}
    if isinstance(asked, ToxicityConfig):
        pickles["trusted_sha256"] = () if own is None else (own.sha256,)
    if own is not None:
        if asked.sha256 not in (None, own.sha256):
            raise RequestRefusedError(
                f"the study wants scorer {asked.model!r} with weights sha256 {asked.sha256}, site {file.site!r} has it "
                f"with {own.sha256}. Agree on one."
            )
        return pickles | {"folder": own.folder, "sha256": own.sha256}
    is_path = not _NAME_OF_MODEL.fullmatch(asked.model) or Path(asked.model).exists()
    if is_path and asked.model != "embedded":
        raise RequestRefusedError(
            f"the study names scorer {asked.model!r}, which is no published name. Give one, and let site "
            f"{file.site!r} say in its file under 'scorers' where it is."
        )
    return pickles | {"folder": None}


def _least(*limits: float | None) -> float | None:
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None
