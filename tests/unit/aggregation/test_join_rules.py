"""The rules by name: found, refused, streamed, and what each of them must hold in memory."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmentor_core.adapters.lora import state_to_bytes
from fedmentor_core.aggregation import find_rule, rule_names
from fedmentor_core.aggregation.base import JoinRule, Updates
from fedmentor_core.aggregation.spool import spooled
from fedmentor_core.aggregation.trimmed_mean import trimmed_mean
from fedmentor_core.config import AggregationConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError

RULES = ("fedavg", "fedex", "median", "svd", "trimmed-mean")
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {A: torch.randn(3, 5, generator=generator), B: torch.randn(7, 3, generator=generator)}


def test_every_rule_is_one_file_and_says_what_it_costs() -> None:
    assert rule_names() == list(RULES)
    for name in RULES:
        rule = find_rule(name)
        assert isinstance(rule, JoinRule)
        said = __import__(type(rule).__module__, fromlist=["__doc__"]).__doc__
        text = " ".join(said.split())
        assert all(word in text for word in ("Exactness", "privacy")), name
        assert "memory" in text.lower(), name
        assert "bytes" in text.lower() or "Cost" in text, name


def test_an_unknown_rule_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"no aggregation rule 'fedexx'. Did you mean 'fedex'\?"):
        find_rule("fedexx")


class Entry:
    """An entry point of another package."""

    value = "elsewhere:RULE"

    def __init__(self, loaded: object) -> None:
        self.name, self.loaded = "halves", loaded

    def load(self) -> object:
        return self.loaded


class Halves:
    """A rule of another package."""

    name = "halves"
    trains = frozenset({"b"})
    weighs = joins_products = corrects_base = fits_ranks = False

    def least_clients(self, settings: AggregationConfig) -> int:
        return 1

    def join(self, settings: AggregationConfig, scale: float, before: Any, updates: Updates) -> dict[str, Any]:
        return {name: tensor / 2 for name, tensor in before.items()}


def test_another_package_adds_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmentor_core.plugins.entry_points", lambda group: [Entry(Halves())])
    assert find_rule("halves").name == "halves"
    assert AggregationConfig(rule="halves").rule == "halves"
    monkeypatch.setattr("fedmentor_core.plugins.entry_points", lambda group: [Entry(object())])
    with pytest.raises(ConfigError, match="no aggregation rule called 'halves'"):
        find_rule("halves")


# --- memory ---------------------------------------------------------------------------------------------------------


class Watched:
    """Counts how many of a client's tensors are alive at once."""

    def __init__(self, n_clients: int) -> None:
        self.n, self.alive, self.most = n_clients, 0, 0

    def updates(self) -> Updates:
        names = [str(i) for i in range(self.n)]
        return Updates(dict.fromkeys(names, 1 / self.n), lambda name: self.held(state(int(name))), self.some)

    def some(self, name: str, wanted: Collection[str]) -> Mapping[str, Any]:
        return self.held({key: tensor for key, tensor in state(int(name)).items() if key in wanted})

    def held(self, content: dict[str, Any]) -> Mapping[str, Any]:
        watched, size = self, sum(tensor.numel() for tensor in content.values())

        class Counted(dict):  # type: ignore[type-arg]
            def __del__(self) -> None:
                watched.alive -= size

        self.alive += size
        self.most = max(self.most, self.alive)
        return Counted(content)


WHOLE = 3 * 5 + 7 * 3


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        ("fedavg", lambda n: 2 * WHOLE),  # one update while the next is read, however many there are
        ("median", lambda n: n * 21),  # one tensor of every client; never the adapter times the clients
        ("trimmed-mean", lambda n: n * 21),
        ("svd", lambda n: n * WHOLE),  # one matrix's factors of every client
        ("fedex", lambda n: n * WHOLE),
    ],
)
def test_what_a_rule_holds_in_memory(rule: str, most: Any) -> None:
    for n in (5, 40):
        watched = Watched(n)
        find_rule(rule).join(AggregationConfig(rule=rule), 2.0, state(99), watched.updates())
        assert watched.most <= most(n)


def test_spooled_updates_are_read_tensor_by_tensor_fetched_once_and_gone_afterwards() -> None:
    fetched: list[Path] = []

    def fetch(seed: int) -> Any:
        def write(path: Path) -> None:
            fetched.append(path)
            path.write_bytes(state_to_bytes(state(seed)))

        return write

    with spooled({"one": fetch(1), "two": fetch(2)}) as read_some:
        assert torch.equal(read_some("one", [A])[A], state(1)[A])
        assert set(read_some("one", [B])) == {B}
        assert torch.equal(read_some("two", [B])[B], state(2)[B])
    assert len(fetched) == 2
    assert not any(path.exists() for path in fetched)


# --- robust means ---------------------------------------------------------------------------------------------------


def test_trimmed_mean_and_median_by_hand() -> None:
    values = torch.tensor([[5.0, 1.0], [1.0, 2.0], [2.0, -100.0], [3.0, 3.0], [1e9, 4.0]])
    assert torch.equal(trimmed_mean(values, 1), torch.tensor([10.0 / 3, 2.0]))
    assert torch.equal(trimmed_mean(values, 2), torch.tensor([3.0, 2.0]))
    with pytest.raises(ValueError, match="more than 6 clients"):
        trimmed_mean(values, 3)
    four = Updates(dict.fromkeys("abcd", 0.25), lambda name: {B: torch.full((1, 1), float("abcd".index(name) ** 2))})
    joined = find_rule("median").join(AggregationConfig(rule="median"), 1.0, {B: torch.zeros(1, 1)}, four)
    assert joined[B].item() == pytest.approx(2.5)  # the mean of the middle two of 0, 1, 4, 9


# --- combinations that contradict each other --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"aggregation": {"rule": "fedex"}}, "is for adapter.train 'both' (got 'b', of which 'fedavg' is exact"),
        ({"aggregation": {"rule": "svd"}, "adapter": {"train": "core"}}, "is for adapter.train 'both'"),
        ({"aggregation": {"rule": "median"}}, "at least 3 clients, and there are only 2 domains"),
        ({"aggregation": {"rule": "trimmed-mean"}}, "at least 3 clients"),
        ({"aggregation": {"rule": "median", "weights": "units"}}, "counts every client the same"),
        (
            {"aggregation": {"rule": "fedex", "server": "adam"}, "adapter": {"train": "both"}},
            "set aggregation.server to 'none'",
        ),
        ({"aggregation": {"weights": "noise-aware"}, "privacy": {"mode": "none"}}, "set it to 'units'"),
        ({"domains.0.rank": 2}, "which aggregation.rule 'fedavg' cannot join"),
        (
            {"domains.0.rank": 9, "adapter": {"train": "both"}, "aggregation": {"rule": "svd"}},
            "rank 9 is above adapter.rank 4",
        ),
        ({"aggregation": {"rule": "medain"}}, "Did you mean 'median'?"),
        ({"adapter": {"start_from": "somewhere"}}, "start_from needs start_sha256"),
        (
            {
                "adapter": {"start_from": "x", "start_sha256": "0" * 64},
                "start_from": "champion",
                "tracking": {"enabled": True},
            },
            "names another start",
        ),
    ],
)
def test_contradictions_are_refused_when_the_configuration_is_read(tiny_study: dict, changes: dict, told: str) -> None:
    for key, value in changes.items():
        if key == "domains.0.rank":
            tiny_study["domains"][0]["rank"] = value
        elif isinstance(value, dict):
            tiny_study[key] = {**tiny_study.get(key, {}), **value}
        else:
            tiny_study[key] = value
    with pytest.raises(ConfigError) as caught:
        validate_config(tiny_study)
    assert told in str(caught.value)
