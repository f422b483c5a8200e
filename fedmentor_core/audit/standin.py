"""Invented text in the place of every domain's own, so that an audit costs nobody anything.

What an audit tests is code and arithmetic: sampling rate, steps, noise, clip and the ledger. All of them follow from
the configuration and the public number of training units N; none looks at what the units say. So the audit trains on
N units in all: the canaries, and invented posts for the rest. Sampling rate and noise multiplier are then exactly
those that the study's first run would have, no real row is read by training, and what the audit run releases and
records may be shown to anybody.
"""

from collections.abc import Mapping

from fedmentor_core.audit.canaries import MIN_CANARIES
from fedmentor_core.config import StorageConfig, StudyConfig
from fedmentor_core.data.sources import DataConfig, InventedSource
from fedmentor_core.errors import ConfigError

LEAST_INVENTED = 3
"""The smallest invented corpus."""
_CORPUS = "peer_forum"  # two rows for each unit, so that clipping all rows of a unit as one is exercised
_FIRST_SEED = 7_000  # far from the seeds of the shipped studies, so that no two share posts


def count_units(config: StudyConfig) -> dict[str, int]:
    """Training units of every domain, by reading the data as a study would. Nothing but the counts is kept.

    Raises:
        ConfigError, DataError: the data cannot be read.
    """
    from fedmentor_core.data.loading import load_study_data

    data = load_study_data(config.domains, config.data)
    return {domain.name: data[domain.name].n_units["train"] for domain in config.domains}


def check_units(config: StudyConfig, units: Mapping[str, int]) -> None:
    """Refuse numbers that do not name every domain once, or leave no room for canaries.

    Raises:
        ConfigError: as it says.
    """
    names = [domain.name for domain in config.domains]
    if set(units) != set(names):
        raise ConfigError(
            f"units: got numbers for {', '.join(sorted(units)) or 'no domain'}; allowed: one number for each of "
            f"{', '.join(names)}. Give all of them, or none to count them in the data."
        )
    least = MIN_CANARIES + LEAST_INVENTED
    small = [f"{name} has {units[name]}" for name in names if units[name] < least]
    if small:
        raise ConfigError(
            f"units: {'; '.join(small)}; allowed: {least} or more, to hold {MIN_CANARIES} canaries. Audit with more "
            "units, or leave the domain out of the study."
        )


def canaries_that_fit(asked: int, n_units: int) -> int:
    """As many canaries as were asked for, or as leave room for the smallest invented corpus."""
    return min(asked, n_units - LEAST_INVENTED)


def standin_config(config: StudyConfig, invented: Mapping[str, int]) -> StudyConfig:
    """The same study on invented text, with a store and an account of its own.

    Args:
        config: the study.
        invented: invented units of each domain, all of them training units.

    Guarantees:
        Names no source, store or ledger of ``config``: nothing of its domains can be read or charged through it.
    """
    domains = tuple(
        domain.model_copy(
            update={
                "source": InventedSource(
                    corpus=domain.source.corpus if isinstance(domain.source, InventedSource) else _CORPUS,
                    n_units=invented[domain.name],
                    seed=_FIRST_SEED + position,
                ),
                "site": None,
                "shares_posts_with": (),
            }
        )
        for position, domain in enumerate(config.domains)
    )
    return config.model_copy(
        update={
            "domains": domains,
            "data": DataConfig(gate_fraction=0.0, test_fraction=0.0),
            "storage": StorageConfig(),
            "privacy": config.privacy.model_copy(update={"ledger_url": None, "max_composed_epsilon": None}),
        }
    )
