"""What a rule that joins updates is, what must hold before an update counts, and how weights are normalised.

Three choices are independent of each other. *What is trained when* is ``adapter.train`` (``adapters/lora.py``). *How
the updates become one adapter* is a rule, a file of this package. *What the server does with the change* is
``server.py``. The weights come from ``weights.py``.

Everything here sees updates that were noised and charged at their sites, public numbers, and nothing else: it is
post-processing (Dwork and Roth 2014, proposition 2.1), so no rule, weight or server step costs privacy.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedmentor_core.aggregation.blocks import squared_distance
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
class ArrivingUpdate:
    """One client's update while it is read; ``tensors`` can be taken once, and raises where the update does not pass.

    Attributes:
        weight: public; the weights of all updates sum to one.
        tensors: by name, to be read and not written to; each checked by shape and type, and all of them together after
            the last.
    """

    weight: float
    tensors: Iterator[tuple[str, Any]]


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


@runtime_checkable
class StreamedRule(JoinRule, Protocol):
    """A rule that needs no update twice, nor two at once, and so can join them while they are still being checked."""

    def join_arriving(self, before: State, updates: Iterable[ArrivingUpdate]) -> dict[str, Any]:
        """The same as ``join``, to the bit.

        Raises:
            FedMentorError: whatever ``updates`` raises; nothing of what was joined so far may then be used.
        """
        ...


class UpdateCheck:
    """What must hold before an update counts, asked of one tensor after another.

    The norm is summed up in fp64. A sum of squares of differences is NaN or infinite where any number is, so finiteness
    needs no pass of its own: only a sum that is not finite makes it look for the tensor at fault.
    """

    def __init__(self, domain: str, expected: State, max_update_norm: float) -> None:
        """See ``check_update``."""
        self._domain = domain
        self._expected = expected
        self._max_update_norm = max_update_norm
        self._squares = 0.0
        self._seen: set[str] = set()

    def see(self, name: str, tensor: Any) -> None:
        """The next tensor.

        Raises:
            UpdateRejectedError: unknown, of another shape or dtype, with NaN or infinity.
        """
        import torch

        expected = self._expected.get(name)
        if expected is None:
            raise self._rejected(f"{name} is not among the tensors of the round")
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise self._rejected(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
            )
        squares = squared_distance(tensor, expected)
        if not math.isfinite(squares) and not bool(torch.isfinite(tensor).all()):
            raise self._rejected(f"{name} holds NaN or infinity")
        self._squares += squares
        self._seen.add(name)

    def finish(self) -> None:
        """After the last tensor.

        Raises:
            UpdateRejectedError: tensors are missing, or all together are too far from the global adapter.
        """
        if missing := sorted(set(self._expected) - self._seen):
            raise self._rejected(f"{len(missing)} tensors missing {missing[:2]}")
        norm = math.sqrt(self._squares)
        if not norm <= self._max_update_norm:
            raise self._rejected(f"L2 norm {norm:.4g} exceeds aggregation.max_update_norm {self._max_update_norm:g}")

    def _rejected(self, why: str) -> UpdateRejectedError:
        return UpdateRejectedError(f"update of {self._domain!r} rejected: {why}.")


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
    if set(state) != set(global_state):
        missing, unknown = sorted(set(global_state) - set(state)), sorted(set(state) - set(global_state))
        raise UpdateRejectedError(
            f"update of {domain!r} rejected: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(unknown)} unknown {unknown[:2]}."
        )
    check = UpdateCheck(domain, global_state, max_update_norm)
    for name, tensor in state.items():
        check.see(name, tensor)
    check.finish()


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
