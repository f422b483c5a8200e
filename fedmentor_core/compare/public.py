"""Whether data may be compared on at all, and what the accounts would have lost if it were private.

A comparison publishes many models of the same data. Each private cell keeps its own promise, but they add up (basic
composition: epsilons and deltas are summed), and the arms without privacy promise nothing. So it is for public or
invented data only.
"""

from collections.abc import Sequence

from fedmentor_core.compare.records import CellResult
from fedmentor_core.config import StudyConfig
from fedmentor_core.errors import ConfigError

KNOWN_PUBLIC = ("invented", "dreaddit", "irf", "multiwd")
"""Kinds of sources that need no statement: invented text, and corpora that were published for research."""


def refuse_unless_public(config: StudyConfig, *, stated: bool) -> None:
    """Refuse a comparison on anything but public or invented data.

    Args:
        config: the study.
        stated: whoever starts the comparison says that the data of every domain is public.

    Raises:
        ConfigError: why, and what to do. Nothing was read.
    """
    at_sites = [one.name for one in config.domains if one.site is not None]
    if at_sites:
        raise ConfigError(
            f"domains {', '.join(at_sites)} are at sites: a comparison trains without privacy too, and publishes many "
            "models of the same posts. Compare on public data of this machine instead."
        )
    ruled = [one.name for one in config.domains if one.policy_file is not None]
    if ruled:
        raise ConfigError(
            f"domains {', '.join(ruled)} have a policy of their own (policy_file), which a comparison would break: "
            "some of its arms have no privacy. Compare on public data, without policy_file."
        )
    if config.evaluation.gate_data == "private":
        raise ConfigError(
            "evaluation.gate_data is 'private': a comparison evaluates many models on the same sets, which a "
            "validation budget does not carry. Compare on public data, with gate_data 'public'."
        )
    if config.privacy.noise_seed is not None:
        raise ConfigError(
            "privacy.noise_seed is set: every private cell must draw new noise, or the interval over seeds would leave "
            "out what privacy costs. Remove it."
        )
    if config.adaptation.relative_to == "reference":
        raise ConfigError(
            "adaptation.relative_to is 'reference', a run that only MLflow knows. Allowed in a comparison: 'none' and "
            "'baseline'."
        )
    unknown = [one.name for one in config.domains if one.source.kind not in KNOWN_PUBLIC]
    advice = "If it is public, say so: --data-is-public (data_is_public in the deployment's settings)."
    if unknown and not stated:
        raise ConfigError(
            f"is the data of {', '.join(unknown)} public? A comparison publishes many models of the same data, and "
            f"some of its arms have no privacy. {advice}"
        )
    if config.privacy.ledger_url is not None and not stated:
        raise ConfigError(
            "privacy.ledger_url is set: these domains have lifetime accounts, and a comparison charges none of them, "
            f"because each cell has accounts of its own. Set it to null, or compare on other data. {advice}"
        )


def statements(config: StudyConfig, *, stated: bool) -> tuple[str, ...]:
    """What every output must say of the data."""
    said = []
    unknown = [one.name for one in config.domains if one.source.kind not in KNOWN_PUBLIC]
    if unknown and stated:
        said.append(f"The data of {', '.join(unknown)} is public by the word of whoever started this comparison.")
    if config.privacy.ledger_url is not None:
        said.append("privacy.ledger_url was not used: nothing here was charged to the lifetime accounts there.")
    if config.start_from == "champion":
        said.append("start_from 'champion' was not used: every arm starts from the backbone.")
    return tuple(said)


def summed_loss(cells: Sequence[CellResult]) -> str:
    """What the same grid would have cost on private data: basic composition over all private cells."""
    epsilon: dict[str, float] = {}
    delta: dict[str, float] = {}
    private = [cell for cell in cells if cell.epsilon_spent]
    for cell in private:
        for client in cell.rounds[-1].clients if cell.rounds else ():
            if client.domain in cell.epsilon_spent:
                epsilon[client.domain] = epsilon.get(client.domain, 0.0) + cell.epsilon_spent[client.domain]
                delta[client.domain] = delta.get(client.domain, 0.0) + (client.delta or 0.0)
    spent = ", ".join(f"{name} epsilon {epsilon[name]:.4g} at delta {delta[name]:.2g}" for name in epsilon)
    counted = "1 private cell" if len(private) == 1 else f"{len(private)} private cells"
    lost = f" Over its {counted} the accounts would have lost in sum: {spent}." if spent else ""
    return (
        "For public or invented data only: arms without privacy promise nothing, and the promises of private cells "
        f"on the same data add up.{lost}"
    )
