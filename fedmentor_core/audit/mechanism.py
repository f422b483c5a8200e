"""What an audit was about: the settings and the code version that make the mechanism, and their digest.

An audit speaks for a model only when both come from the same mechanism. The number of units is no part of it: with
the budget and the schedule it gives sampling rate and noise by calibration, and it changes from night to night.
"""

from typing import Any

from pydantic import Field

from fedmentor_core import __version__
from fedmentor_core.config import DomainConfig, StudyConfig
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.privacy.policy import policy_of, under_policy
from fedmentor_core.records import Record

Value = str | int | float | bool | None
_RUN_PRIVACY = ("mode", "level", "planned_runs", "reserve_fraction", "max_noise_multiplier", "noise_seed")


class Mechanism(Record):
    """Settings by dotted name, flat, so that a difference can be named."""

    parts: dict[str, Value] = Field(description="Such as 'training.batch_size': 64.")

    @classmethod
    def of(cls, config: StudyConfig, backbone_sha256: str) -> "Mechanism":
        """The mechanism that a study's configuration describes, run by this installation.

        Args:
            config: the study.
            backbone_sha256: digest of the frozen weights that were loaded.

        Raises:
            ConfigError: a site's policy file cannot be used.
        """
        parts: dict[str, Value] = {
            "fedmentor": __version__,
            "backbone.sha256": backbone_sha256,
            "backbone.dtype": config.backbone.dtype,
            "backbone.max_length": config.backbone.max_length,
            "rounds": config.rounds,
        }
        sections = {"adapter": config.adapter, "training": config.training, "adaptation": config.adaptation}
        for name, section in sections.items():
            parts |= _flat(name, section.model_dump(mode="json", exclude={"start_from"}))  # a place, not a setting
        parts |= _flat("privacy", config.privacy.model_dump(mode="json", include=set(_RUN_PRIVACY)))
        for domain in config.domains:
            parts |= _flat(f"domains.{domain.name}", _promise(config, domain))
        return cls(parts=parts)

    @property
    def sha256(self) -> str:
        """Digest of all parts."""
        return canonical_sha256(self.parts)

    @property
    def domains(self) -> frozenset[str]:
        """Names of the domains that take part."""
        return frozenset(name.split(".")[1] for name in self.parts if name.startswith("domains."))

    def differences(self, other: "Mechanism") -> tuple[str, ...]:
        """Each part in which the two differ, as 'name: this / other'; empty when they are the same."""
        missing = "(none)"
        found = []
        for name in sorted({*self.parts, *other.parts}):
            mine, theirs = self.parts.get(name, missing), other.parts.get(name, missing)
            if mine != theirs:
                found.append(f"{name}: {mine} / {theirs}")
        return tuple(found)


def _promise(config: StudyConfig, domain: DomainConfig) -> dict[str, Value]:
    """The domain's budget, clip norm and least noise as they apply, however and wherever they were written down."""
    floor = under_policy(domain, policy_of(config, domain)).min_noise_multiplier
    return {
        "epsilon": config.epsilon_of(domain),
        "delta": domain.delta,
        "clip_norm": config.clip_norm_of(domain),
        "min_noise_multiplier": floor,
    }


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Value]:
    """One level of names; a list becomes one text."""
    return {
        f"{prefix}.{name}": ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        for name, value in values.items()
    }
