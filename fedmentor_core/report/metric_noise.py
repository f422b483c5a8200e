"""How far the noise in a private set's metrics may have moved them: one standard deviation, per domain and overall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

from fedmentor_core.records import StudyPlan


@dataclass(frozen=True, slots=True)
class MetricNoise:
    """Standard deviation of the noise in every released metric of a set; nothing for a public set."""

    std: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: StudyPlan, split: Literal["gate", "test"]) -> "MetricNoise":
        """The noise that ``plan`` fixed for the gate or the test set."""
        found = {
            domain.domain: account.metric_std
            for domain in plan.domains
            for account in domain.validation
            if account.split == split and account.metric_std is not None
        }
        return cls(found)

    def of_domain(self, domain: str) -> float | None:
        """Of one domain's own metrics."""
        return self.std.get(domain)

    def of_mean(self, domains: Sequence[str]) -> float | None:
        """Of the mean over ``domains``, which counts each the same; their noises are independent, so variances add."""
        known = [self.std[name] for name in domains if name in self.std]
        return sqrt(sum(std * std for std in known)) / len(domains) if known else None
