"""What a rule that joins updates is, what must hold before an update counts, and how weights are normalised.

Three choices are independent of each other. *What is trained when* is ``adapter.train`` (``adapters/lora.py``). *How
the updates become one adapter* is a rule, a file of this package. *What the server does with the change* is
``server.py``. The weights come from ``weights.py``.

Everything here sees updates that were noised and charged at their sites, public numbers, and nothing else: it is
post-processing (Dwork and Roth 2014, proposition 2.1), so no rule, weight or server step costs privacy.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedmentor_core.config import AggregationConfig
from fedmentor_core.errors import UpdateRejectedError

State = Mapping[str, Any]


@dataclass(frozen=True)
class WeightedUpdate:
    """One client's checked update and its public weight."""

    domain: str
    weight: float
    state: State


@dataclass(frozen=True)
class Updates:
    """Checked updates, read as often as a rule needs them and as little at once.

    Attributes:
        weights: by client; they sum to one.
        read: a client's whole update.
        read_some: the named tensors of a client's update; None: out of ``read``.
    """

    weights: Mapping[str, float]
    read: Callable[[str], State]
    read_some: Callable[[str, Collection[str]], State] | None = None

    def stream(self) -> Iterator[WeightedUpdate]:
        """One whole update after another: a sum over clients needs no more than one in memory."""
        for domain, weight in self.weights.items():
            yield WeightedUpdate(domain, weight, self.read(domain))

    def only(self, names: Collection[str]) -> list[WeightedUpdate]:
        """A few tensors of every client at once, for rules that must see all clients' values together."""
        found = []
        for domain, weight in self.weights.items():
            if self.read_some is not None:
                part = self.read_some(domain, names)
            else:
                whole = self.read(domain)
                part = {name: whole[name] for name in names}
            found.append(WeightedUpdate(domain, weight, part))
        return found


@runtime_checkable
class JoinRule(Protocol):
    """A rule. It keeps no state of its own: a resumed run must join as one that was never interrupted."""

    @property
    def name(self) -> str:
        """What ``aggregation.rule`` calls it."""
        ...

    @property
    def trains(self) -> frozenset[str]:
        """The values of ``adapter.train`` that it is for."""
        ...

    @property
    def weighs(self) -> bool:
        """Whether it uses the clients' weights."""
        ...

    @property
    def joins_products(self) -> bool:
        """True when it joins the products B A; False when it joins each factor by itself."""
        ...

    @property
    def corrects_base(self) -> bool:
        """Whether it adds to the frozen base."""
        ...

    @property
    def fits_ranks(self) -> bool:
        """Whether clients may have ranks of their own."""
        ...

    def least_clients(self, settings: AggregationConfig) -> int:
        """Fewest updates that it can join."""
        ...

    def join(self, settings: AggregationConfig, scale: float, before: State, updates: Updates) -> dict[str, Any]:
        """The next global adapter.

        Args:
            settings: the aggregation section.
            scale: s = alpha / rank; the adapter adds s B A to a weight matrix.
            before: the round's trained tensors, and what was added to the base so far (``adapters/base_delta.py``).
            updates: checked against ``before``.

        Returns:
            The trained tensors with the shapes and dtypes of ``before``, and what is added to the base from now on.
        """
        ...


def check_update(domain: str, state: State, global_state: State, max_update_norm: float) -> None:
    """Refuse what must never enter an average.

    Args:
        domain: whose update it is (for the message).
        state: the client's trained tensors.
        global_state: the round's trained tensors, which fix names, shapes and dtypes.
        max_update_norm: largest L2 distance from the global adapter, over all tensors jointly.

    Raises:
        UpdateRejectedError: missing or unknown tensors, another shape or dtype, NaN or infinity, oversized.
    """
    import torch

    if set(state) != set(global_state):
        missing, unknown = sorted(set(global_state) - set(state)), sorted(set(state) - set(global_state))
        raise UpdateRejectedError(
            f"update of {domain!r} rejected: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(unknown)} unknown {unknown[:2]}."
        )
    total = 0.0
    for name, tensor in state.items():
        expected = global_state[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise UpdateRejectedError(
                f"update of {domain!r} rejected: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                f"{tuple(expected.shape)} {expected.dtype}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateRejectedError(f"update of {domain!r} rejected: {name} holds NaN or infinity.")
        total += float((tensor.double() - expected.double()).square().sum())
    if math.sqrt(total) > max_update_norm:
        raise UpdateRejectedError(
            f"update of {domain!r} rejected: L2 norm {math.sqrt(total):.4g} exceeds "
            f"aggregation.max_update_norm {max_update_norm:g}."
        )


def normalised(weights: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Weights that sum to one.

    Raises:
        ValueError: nothing to weigh, or a weight that is not positive and finite.
    """
    total = math.fsum(weights.values())
    for domain, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"Expected weight of {domain}={weight} > 0 and finite.")
        yield domain, weight / total
