"""What a study's adapters and updates will weigh, to the byte, before there is one: by configuration and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from fedmentor_core.adapters.base_delta import largest_delta
from fedmentor_core.adapters.lora import factor_name, factor_of, modules_of, trained_factors
from fedmentor_core.adapters.shapes import AdapterShapes, trained_shapes
from fedmentor_core.aggregation import find_rule
from fedmentor_core.aggregation.server import memory_layout
from fedmentor_core.config import StudyConfig
from fedmentor_core.wire.codecs import Layout, Shape, StoredType, find_codec
from fedmentor_core.wire.planned import adapter_bytes
from fedmentor_core.wire.update import update_bytes, update_header, update_seed

_ROUND_KINDS = (0, 1)  # rounds that train different factors alternate
_ANY_DIGEST = "0" * 64


def update_metadata(run_id: str, round_index: int, base_sha256: str) -> dict[str, str]:
    """What an update says about itself inside its safetensors header; of constant length within a run."""
    return {"run_id": run_id, "round_index": f"{round_index:06d}", "base_sha256": base_sha256}


@dataclass(frozen=True)
class Traffic:
    """The bytes of one run.

    Attributes:
        config: the study.
        run_id: of the run; its length counts.
        n_clients: clients of the whole study.
        shapes: of the global adapter.
    """

    config: StudyConfig
    run_id: str
    n_clients: int
    shapes: AdapterShapes

    def bytes_up(self, domain: str, round_index: int | None = None) -> int:
        """Size of a client's update in a round; None: of the largest, as a plan names it."""
        if round_index is None:
            return max(self.bytes_up(domain, index) for index in _ROUND_KINDS)
        metadata = update_metadata(self.run_id, round_index, _ANY_DIGEST)
        return update_bytes(self._sent_shapes(domain, round_index), find_codec(self.config.wire.upload), metadata)

    def update_header(self, domain: str, round_index: int, attempt: int, base_sha256: str) -> dict[str, str]:
        """All that the header of a client's update in a round must say."""
        metadata = update_metadata(self.run_id, round_index, base_sha256)
        codec, seed = find_codec(self.config.wire.upload), update_seed(self.config.seed, round_index, domain, attempt)
        return update_header(self._sent_shapes(domain, round_index), codec, base_sha256, metadata, seed)

    def bytes_down(self, round_index: int | None = None) -> int:
        """What a client that took part so far reads to start a round; None: the most of any round after the first.

        It is exact where every earlier round joined an update, and where the study starts from no correction of the
        base. Of a rule that adds to the base, by a rank that nobody knows before, it is the most that there can be.
        """
        if round_index is None:
            last = max(1, self.config.rounds - 1)
            return max(self.bytes_down(index) for index in {*range(1, min(last, 3) + 1), last})
        adapter, codec = self.config.adapter, find_codec(self.config.wire.download)
        shapes = self.shapes.trained
        if round_index == 0:
            both = (shapes, self.shapes.frozen)  # what nobody trains travels once
            return sum(adapter_bytes(one, codec, held={}, base={}, server={}) for one in both)
        changed = trained_factors(adapter.train, round_index - 1)
        so_far = frozenset().union(*(trained_factors(adapter.train, index) for index in range(min(round_index, 2))))
        return adapter_bytes(
            {name: shape for name, shape in shapes.items() if factor_of(name) in changed},
            codec,
            held={name: shape for name, shape in shapes.items() if factor_of(name) not in changed},
            base=self._most_added_to_base(round_index),
            server=memory_layout(
                self.config.aggregation, {name: shape for name, shape in shapes.items() if factor_of(name) in so_far}
            ),
        )

    def n_trainable(self) -> int:
        """Parameters that a client trains in a round; where rounds differ, in the round that trains most."""
        adapter = self.config.adapter
        return max(
            sum(map(prod, trained_shapes(self.shapes.trained, adapter, index).values())) for index in _ROUND_KINDS
        )

    def _sent_shapes(self, domain: str, round_index: int) -> Mapping[str, Shape]:
        return trained_shapes(self.shapes.trained, self.config.adapter_of(domain), round_index)

    def _most_added_to_base(self, n_rounds: int) -> Layout:
        """The most that the rule can have added after so many rounds; one client's product leaves nothing over."""
        if not find_rule(self.config.aggregation.rule).corrects_base or self.n_clients == 1:
            return {}
        shapes, rank = self.shapes.trained, self.config.adapter.rank
        a_round = (self.n_clients - 1) * rank  # deviations from their own mean sum to zero
        columns = (n_rounds - 1) * a_round + self.n_clients * rank
        largest: dict[str, tuple[StoredType, Shape]] = {}
        for module in modules_of(shapes):
            m, n = shapes[factor_name(module, "B")][0], shapes[factor_name(module, "A")][1]
            largest |= largest_delta(module, m, n, columns=columns, kept=n_rounds * a_round)
        return largest
