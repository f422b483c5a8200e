"""The arms of a comparison: which study each one is, derived from one configuration. To add an arm, add it here.

What all arms share is fixed in ``cell_config``: data, splits, backbone, rounds, steps and evaluation are the
configuration's own, and no gate, champion or registry has a say. An arm changes only what its title says.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedmentor_core.config import (
    AdaptationConfig,
    AggregationConfig,
    AuditConfig,
    PrivacyConfig,
    StorageConfig,
    StudyConfig,
    TrackingConfig,
)
from fedmentor_core.errors import ConfigError

Procedure = Literal["untrained", "alone", "pooled", "federated"]
"""How a cell is made: ``fedmentor_core/compare/procedures.py`` has one function for each."""

POOLED = "all-domains"
"""The one client of the arm that trains on all data together."""


@dataclass(frozen=True)
class Arm:
    """A way to make a model.

    Attributes:
        name: on the command line and in ``table.json``.
        title: in words, for people.
        procedure: how it is trained.
        private: whether every unit gets the promise of its budget.
        derive: the study that the arm is, from the configuration that all arms start from.
    """

    name: str
    title: str
    procedure: Procedure
    private: bool
    derive: Callable[[StudyConfig], StudyConfig]


def cell_config(config: StudyConfig, arm: Arm, seed: int, epsilon: float | None = None) -> StudyConfig:
    """The study of one cell.

    Args:
        config: what all arms start from.
        arm: which change to make.
        seed: initial adapter and order of the data. Splits and evaluated rows come from ``data.split_seed`` and do not
            change; DP noise and the private sample come from the system's entropy and are new in every cell.
        epsilon: the lifetime budget of every domain, instead of each domain's own.

    Guarantees:
        The cell keeps its accounts in its own folder, decides nothing by a gate, and reads nothing but its data.
    """
    evaluation = config.evaluation.model_copy(update={"thresholds": ()})
    # a process for each client would load the backbone hundreds of times over a grid
    execution = config.execution.model_copy(update={"isolation": "none"})
    common = config.model_copy(
        update={
            "name": arm.name,
            "seed": seed,
            "start_from": "backbone",
            "privacy": config.privacy.model_copy(update={"ledger_url": None}),
            "evaluation": evaluation,
            "storage": StorageConfig(),
            "tracking": TrackingConfig(enabled=False),
            "audit": AuditConfig(),
            "execution": execution,
        }
    )
    return arm.derive(common if epsilon is None else with_one_budget(common, epsilon))


def with_one_budget(config: StudyConfig, epsilon: float) -> StudyConfig:
    """The same study with one epsilon for every domain; each keeps its delta."""
    domains = (one.model_copy(update={"epsilon": epsilon, "sensitivity": None}) for one in config.domains)
    return config.model_copy(update={"domains": tuple(domains)})


def strictest_budget(config: StudyConfig) -> float:
    """The smallest epsilon that any domain was promised: as everyone's budget it keeps every promise."""
    return min(config.epsilon_of(domain) for domain in config.domains)


def find_arm(name: str) -> Arm:
    """The arm called ``name``.

    Raises:
        ConfigError: there is none.
    """
    for arm in ARMS:
        if arm.name == name:
            return arm
    close = difflib.get_close_matches(name, ARM_NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"arm {name!r} is not known.{hint} Allowed: {', '.join(ARM_NAMES)}.")


def _privacy(config: StudyConfig, mode: Literal["dp", "none"]) -> PrivacyConfig:
    return config.privacy.model_copy(update={"mode": mode})


def _adaptation(config: StudyConfig, rule: str) -> AdaptationConfig:
    return config.adaptation.model_copy(update={"rule": rule})


def _without_privacy(config: StudyConfig) -> StudyConfig:
    aggregation = config.aggregation
    if aggregation.weights == "noise-aware":  # there is no noise to weigh by
        aggregation = aggregation.model_copy(update={"weights": "units"})
    return config.model_copy(update={"privacy": _privacy(config, "none"), "aggregation": aggregation})


def _alone(config: StudyConfig) -> StudyConfig:
    """Clients without a server: nothing to aggregate, and no reason for ranks of their own."""
    domains = tuple(one.model_copy(update={"rank": None}) for one in config.domains)
    return _without_privacy(config).model_copy(update={"aggregation": AggregationConfig(), "domains": domains})


def _pooled(config: StudyConfig) -> StudyConfig:
    """One client that takes in each step what all clients take together."""
    alone = _alone(config)
    batch = config.training.batch_size * len(config.domains)
    return alone.model_copy(
        update={
            "domains": (alone.domains[0].model_copy(update={"name": POOLED}),),
            "training": config.training.model_copy(update={"batch_size": batch}),
        }
    )


def _fixed(config: StudyConfig) -> StudyConfig:
    return config.model_copy(
        update={"privacy": _privacy(config, "dp"), "adaptation": _adaptation(config, "fixed")},
    )


def _uniform(config: StudyConfig) -> StudyConfig:
    return _fixed(with_one_budget(config, strictest_budget(config)))


def _adaptive(config: StudyConfig) -> StudyConfig:
    rule = "paper" if config.adaptation.rule == "fixed" else config.adaptation.rule
    return config.model_copy(
        update={"privacy": _privacy(config, "dp"), "adaptation": _adaptation(config, rule)},
    )


ARMS = (
    Arm("base", "untrained backbone", "untrained", False, _alone),
    Arm("local", "each domain alone, without privacy", "alone", False, _alone),
    Arm("centralized", "all data on one machine, without privacy", "pooled", False, _pooled),
    Arm("federated", "federated, without privacy", "federated", False, _without_privacy),
    Arm("uniform", "federated, one budget for all domains", "federated", True, _uniform),
    Arm("fedmentor-fixed", "a budget per domain, fixed noise", "federated", True, _fixed),
    Arm("fedmentor", "a budget per domain, noise adapted by the gate", "federated", True, _adaptive),
)
"""In the order of the table's rows."""

ARM_NAMES = tuple(arm.name for arm in ARMS)
