"""The site's own policy: what a domain allows, whoever asks. The site is sovereign.

A study's configuration says what its author wishes. ``domains.N.policy_file`` names a YAML file that belongs to the
domain, and what it says comes first: a study that asks for a larger budget, less noise, a higher sample rate, another
backbone or adapter is refused, in the plan and again at the site before every round. Without such a file the policy is
derived from the configuration, so that a server can still not ask for more in a round than the study was planned with.

Everything here is a pure function of the policy, public numbers and what is asked; no data is looked at.
"""

import math
from pathlib import Path

from pydantic import Field, ValidationError

from fedmentor_core.config import AdapterConfig, DomainConfig, Name, Section, StudyConfig, TrainedFactors
from fedmentor_core.config_io import explain, read_mapping
from fedmentor_core.errors import ConfigError
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.privacy.mechanism import PrivacyLevel
from fedmentor_core.privacy.refusals import refused
from fedmentor_core.records import ClientAssignment, DomainPlan

EXAMPLE = "infra/policies/site_policy_example.yaml"


class AllowedAdapters(Section):
    """Which adapters may be trained on the domain's posts. What is left out is not restricted."""

    train: tuple[TrainedFactors, ...] | None = Field(default=None, min_length=1, description="Train modes.")
    max_rank: int | None = Field(default=None, ge=1, description="Largest LoRA rank.")
    target_modules: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Names of the linear modules that may be adapted, such as q_proj."
    )


class SitePolicy(Section):
    """What one domain allows. Every limit is the site's last word."""

    domain: Name = Field(description="Whose policy this is; must be the domain that names the file.")
    epsilon: float = Field(gt=0, le=100, description="Largest lifetime budget of the training posts.")
    delta: float | None = Field(default=None, gt=0, lt=0.1, description="Largest delta; default: any below 1/N.")
    validation_epsilon: float | None = Field(
        default=None, gt=0, le=100, description="Largest budget of each private gate or test set; default: epsilon."
    )
    min_noise_multiplier: float = Field(default=0.3, ge=0, le=1e4, description="Less noise than this is refused.")
    clip_norm: float = Field(default=1e4, gt=0, le=1e4, description="Largest clip norm.")
    max_sample_rate: float = Field(default=1.0, gt=0, le=1, description="Largest Poisson sample rate of a step.")
    max_steps_per_round: int = Field(default=100_000, ge=1, le=100_000, description="Most optimiser steps a round.")
    allowed_backbones: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="sha256 of the backbones that may see the posts; default: any."
    )
    allowed_adapters: AllowedAdapters = AllowedAdapters()
    privacy_level: PrivacyLevel = Field(default="unit", description="What must be protected.")
    allow_not_private: bool = Field(
        default=False, description="Admit runs without noise or with seeded noise. Not for real posts."
    )

    @property
    def sha256(self) -> str:
        """Digest of what the policy says, as plan and ledger carry it."""
        return canonical_sha256(self.model_dump(mode="json"))


def load_policy(path: str | Path, domain: str) -> SitePolicy:
    """Read a domain's policy file.

    Args:
        path: YAML; relative paths start at the working directory.
        domain: whose policy it must be.

    Raises:
        ConfigError: missing, not valid, or another domain's.
    """
    raw = read_mapping(path, f"policy file of domain {domain!r}", example=EXAMPLE)
    try:
        policy = SitePolicy.model_validate(raw)
    except ValidationError as error:
        listed = "\n".join(explain(error, SitePolicy))
        raise ConfigError(f"{path} is not a valid site policy:\n{listed}") from None
    if policy.domain != domain:
        raise ConfigError(
            f"{path} is the policy of domain {policy.domain!r}, and domain {domain!r} names it. One file speaks for "
            "one domain: give each its own policy_file."
        )
    return policy


def policy_of(config: StudyConfig, domain: DomainConfig) -> SitePolicy:
    """The domain's own policy where it has a file, else one that allows what the configuration asks for and no more.

    Raises:
        ConfigError: the file cannot be used.
    """
    if domain.policy_file is not None:
        return load_policy(domain.policy_file, domain.name)
    epsilon = domain.validation_epsilon
    return SitePolicy(
        domain=domain.name,
        epsilon=config.epsilon_of(domain),
        delta=domain.delta,
        validation_epsilon=config.evaluation.private.epsilon if epsilon is None else epsilon,
        min_noise_multiplier=domain.min_noise_multiplier,
        clip_norm=config.clip_norm_of(domain),
        max_steps_per_round=config.training.steps_per_round,
        privacy_level=config.privacy.level,
        allow_not_private=not config.is_private,
    )


def under_policy(domain: DomainConfig, policy: SitePolicy) -> DomainConfig:
    """The domain as it is planned: with the higher of the study's and the site's least noise multiplier."""
    floor = max(domain.min_noise_multiplier, policy.min_noise_multiplier)
    return domain.model_copy(update={"min_noise_multiplier": floor})


def plan_under_policy(
    plan: DomainPlan, policy: SitePolicy, config: StudyConfig, backbone_sha256: str, adapter: AdapterConfig
) -> DomainPlan:
    """A domain's plan with the policy's digest, refused where the site would refuse it."""
    reasons = study_refusals(policy, plan, backbone_sha256, adapter, is_private=config.is_private)
    return refused(
        plan.model_copy(update={"policy_sha256": policy.sha256}),
        *(f"domain {plan.domain!r}: the site's policy refuses: {reason}" for reason in reasons),
    )


def study_refusals(
    policy: SitePolicy, plan: DomainPlan, backbone_sha256: str, adapter: AdapterConfig, *, is_private: bool
) -> tuple[str, ...]:
    """All that a site refuses of a study, before any round.

    Args:
        policy: the site's.
        plan: what the study promises the domain and asks of it.
        backbone_sha256: of the backbone that would see the posts.
        adapter: with ``target_modules`` as names.
        is_private: False for a run without noise or with seeded noise.
    """
    found: list[str] = []

    def limit(what: str, asked: float | None, allowed: float | None) -> None:
        if asked is not None and allowed is not None and not asked <= allowed:
            found.append(f"{what} {asked:g} asked for, the site allows {allowed:g}")

    if not is_private and not policy.allow_not_private:
        found.append("a run that is not private (no noise, or seeded noise), the site allows none")
    if plan.privacy_level != policy.privacy_level:
        found.append(f"privacy.level {plan.privacy_level!r} asked for, the site demands {policy.privacy_level!r}")
    limit("epsilon", plan.epsilon_budget, policy.epsilon)
    limit("delta", plan.delta, policy.delta)
    for one in plan.validation:
        most = policy.epsilon if policy.validation_epsilon is None else policy.validation_epsilon
        limit(f"validation epsilon of {one.account}", one.epsilon_budget, most)
    limit("clip norm", plan.clip_norm, policy.clip_norm)
    limit("sample rate", plan.sample_rate, policy.max_sample_rate)
    limit("steps a round", plan.steps_per_round, policy.max_steps_per_round)
    if policy.allowed_backbones is not None and backbone_sha256 not in policy.allowed_backbones:
        found.append(f"backbone {backbone_sha256[:12]} asked for, which is none of those that the site allows")
    found.extend(_adapter_refusals(policy.allowed_adapters, adapter))
    return tuple(found)


def policy_refusal(
    policy: SitePolicy,
    plan: DomainPlan,
    assignment: ClientAssignment,
    backbone_sha256: str,
    adapter: AdapterConfig,
    *,
    is_private: bool,
) -> str | None:
    """Why the site refuses what the server asks in one round, or None.

    The server's wishes are requests. Sampling, clip norm and steps must be those that the site planned with, and all
    that ``study_refusals`` looks at is looked at again, because the policy may have changed since.
    """
    asked = study_refusals(policy, plan, backbone_sha256, adapter, is_private=is_private)
    if asked:
        return "; ".join(asked)
    noise, floor = assignment.noise_multiplier, max(policy.min_noise_multiplier, plan.min_noise_multiplier)
    without_noise = plan.epsilon_budget is None and policy.allow_not_private  # a baseline run that the site admits
    if not without_noise and (noise is None or not floor <= noise < math.inf):
        return f"noise multiplier {noise} asked for, the site's floor is {floor:g}"
    if assignment.sample_rate != plan.sample_rate:
        return f"sample rate {assignment.sample_rate:g} asked for, the site samples at {plan.sample_rate:g}"
    if assignment.clip_norm != plan.clip_norm:
        return f"clip norm {assignment.clip_norm:g} asked for, the site clips at {plan.clip_norm:g}"
    if not 0 < assignment.steps <= plan.steps_per_round:
        return f"{assignment.steps} steps asked for, the site plans {plan.steps_per_round} a round"
    return None


def _adapter_refusals(allowed: AllowedAdapters, adapter: AdapterConfig) -> list[str]:
    found = []
    if allowed.train is not None and adapter.train not in allowed.train:
        found.append(f"adapter.train {adapter.train!r} asked for, the site allows {', '.join(allowed.train)}")
    if allowed.max_rank is not None and adapter.rank > allowed.max_rank:
        found.append(f"adapter.rank {adapter.rank} asked for, the site allows {allowed.max_rank}")
    if allowed.target_modules is not None:
        named = (adapter.target_modules,) if isinstance(adapter.target_modules, str) else adapter.target_modules
        others = sorted(set(named) - set(allowed.target_modules))
        if others:
            listed = ", ".join(allowed.target_modules)
            found.append(f"adapter.target_modules {', '.join(others)} asked for, the site allows {listed}")
    return found
