"""A configuration that cannot be run is refused in words that say what to change."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmentor_core.config_io import config_sha256, load_config, validate_config
from fedmentor_core.errors import ConfigError

BASE: dict[str, Any] = {
    "name": "study",
    "domains": [
        {"name": "stress", "source": {"kind": "invented", "corpus": "stress", "n_units": 100}, "epsilon": 8.0},
        {"name": "sleep", "source": {"kind": "invented", "corpus": "sleep", "n_units": 100}, "sensitivity": "high"},
    ],
    "evaluation": {"gate_data": "public"},
}


@pytest.fixture
def base() -> dict[str, Any]:
    return copy.deepcopy(BASE)


@pytest.fixture
def file(tmp_path: Path, base: dict[str, Any]) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def refusal(raw: dict[str, Any]) -> str:
    """The message; never with a traceback or pydantic's own address in it."""
    with pytest.raises(ConfigError) as caught:
        validate_config(raw, where="study.yaml")
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "Traceback" not in message
    assert "pydantic.dev" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return message


def with_value(raw: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    *parents, last = dotted.split(".")
    node = raw
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = value
    return raw


def test_base_is_valid(base: dict[str, Any]) -> None:
    config = validate_config(base)
    assert [config.epsilon_of(domain) for domain in config.domains] == [8.0, 4.0]
    assert config.is_private


@pytest.mark.parametrize(
    ("dotted", "close"),
    [
        ("rouns", "rounds"),
        ("privacy.clip_nrom", "clip_norm"),
        ("training.learning_rte", "learning_rate"),
        ("adapter.rnk", "rank"),
    ],
)
def test_unknown_key_names_the_field_and_suggests(base: dict[str, Any], dotted: str, close: str) -> None:
    message = refusal(with_value(base, dotted, 1))
    assert f"{dotted}: unknown key; did you mean '{close}'?" in message
    assert "Allowed here:" in message


def test_unknown_key_of_a_domain_is_named(base: dict[str, Any]) -> None:
    assert "domains.0.epsilonn: unknown key" in refusal(with_value(base, "domains.0.epsilonn", 1))


@pytest.mark.parametrize(
    ("dotted", "value", "told"),
    [
        ("rounds", 0, "greater than or equal to 1"),
        ("domains.0.epsilon", -1, "greater than 0"),
        ("domains.0.epsilon", 1000, "less than or equal to 100"),
        ("domains.0.delta", 0.5, "less than 0.1"),
        ("privacy.clip_norm", float("nan"), "finite number"),
        ("privacy.clip_norm", float("inf"), "finite number"),
        ("privacy.reserve_fraction", 1.0, "less than 1"),
        ("privacy.mode", "maybe", "'dp' or 'none'"),
        ("training.batch_size", "many", "valid integer"),
        ("adapter.train", "a", "'b', 'both', 'alternate' or 'core'"),
        ("backbone.sha256", "abc", "pattern"),
        ("storage.url", "/plain/path", "pattern"),
        ("adapter.target_modules", [], "at least one module"),
        ("privacy.epsilon_by_sensitivity", {"low": 1.0, "medium": 2.0, "high": 3.0}, "high <= medium <= low"),
        ("privacy.epsilon_by_sensitivity", {"low": 8.0}, "missing ['high', 'medium']"),
    ],
)
def test_impossible_value_names_the_field_and_what_is_allowed(
    base: dict[str, Any], dotted: str, value: Any, told: str
) -> None:
    message = refusal(with_value(base, dotted, value))
    assert dotted in message
    assert told in message
    if isinstance(value, int | float | str):
        assert f"got {value!r}" in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"domains.0.sensitivity": "low"}, "exactly one of 'epsilon' and 'sensitivity'"),
        ({"domains.0.epsilon": None}, "exactly one of 'epsilon' and 'sensitivity'"),
        ({"domains.1.name": "stress"}, "names must differ; repeated: ['stress']"),
        (
            {
                "evaluation.gate_data": "private",
                "evaluation.thresholds": [{"metric": "toxicity_max", "at_most": 0.5}],
            },
            "cannot be released from a private gate set",
        ),
        ({"evaluation.thresholds": [{"metric": "rouge_l", "at_least": 0.1, "scope": "slep"}]}, "neither 'overall'"),
        (
            {"evaluation.thresholds": [{"metric": "rouge_l", "at_least": 0.9, "relative_to": "reference"}]},
            "tracking.reference_run_id names no MLflow run",
        ),
        ({"adaptation.relative_to": "reference"}, "tracking.reference_run_id names no MLflow run"),
        ({"evaluation.thresholds": [{"metric": "rouge_l"}]}, "exactly one of 'at_least' and 'at_most'"),
        ({"aggregation.min_clients": 3}, "there are only 2 domains"),
        ({"training.max_target_tokens": 192}, "must be below backbone.max_length (192)"),
        ({"evaluation.max_new_tokens": 192}, "must be below backbone.max_length (192)"),
    ],
)
def test_contradictions_are_refused(base: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    for dotted, value in changes.items():
        with_value(base, dotted, value)
    assert told in refusal(base)


def test_gate_data_has_no_default(base: dict[str, Any]) -> None:
    base["evaluation"] = {}
    assert "evaluation.gate_data: is required and missing" in refusal(base)


def test_all_problems_are_told_at_once(base: dict[str, Any]) -> None:
    message = refusal(with_value(with_value(base, "rounds", 0), "adapter.rank", 0))
    assert "rounds" in message
    assert "adapter.rank" in message


def test_overrides_reach_sections_and_list_items_by_name_or_index(file: Path) -> None:
    config = load_config(
        file,
        [
            "rounds=2",
            "training.learning_rate=1e-3",
            "domains.stress.epsilon=4",
            "domains.1.clip_norm=0.5",
            "adapter.target_modules=[q_proj, v_proj]",
            "privacy.mode=none",
            "storage.url=s3://bucket/with=sign",
            "domains.sleep.delta=",
        ],
    )
    assert config.rounds == 2
    assert config.training.learning_rate == 1e-3
    assert config.domain("stress").epsilon == 4
    assert config.domain("sleep").clip_norm == 0.5
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert not config.is_private
    assert config.storage.url == "s3://bucket/with=sign"
    assert config.domain("sleep").delta is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rounds", "needs dotted.key=value"),
        ("=2", "needs dotted.key=value"),
        ("domains.strss.epsilon=1", "use a name of ['stress', 'sleep']"),
        ("domains.7.epsilon=1", "an index below 2"),
        ("name.x.y=1", "inside a plain value"),
        ("name.x=1", "no section to hold 'x'"),
        ("rounds=[", "not valid YAML"),
        ("rouns=2", "did you mean 'rounds'"),
        ("rounds=zero", "valid integer"),
    ],
)
def test_wrong_overrides_are_refused(file: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert told in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"- a\n- b", "must hold a mapping"), (b"a: [", "not valid YAML"), (b"", "must hold a mapping"),
     (b"\xff\xfe\x00", "UTF-8")],
)  # fmt: skip
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load_config(path)
    with pytest.raises(ConfigError, match="not found"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError):
        load_config(tmp_path)


def test_digest_counts_what_is_computed_and_no_places(base: dict[str, Any]) -> None:
    digest = config_sha256(validate_config(copy.deepcopy(base)))
    places = {
        "storage.url": "s3://bucket/x",
        "storage.endpoint_url": "http://localhost:9000",
        "tracking.uri": "sqlite:///x.db",
        "execution.max_parallel_clients": 2,
        "data.root": "/somewhere/else",
    }
    for dotted, value in places.items():
        assert config_sha256(validate_config(with_value(copy.deepcopy(base), dotted, value))) == digest, dotted
    computed = {"seed": 1, "rounds": 4, "privacy.clip_norm": 0.5, "domains.0.epsilon": 7.0, "data.split_seed": 5}
    for dotted, value in computed.items():
        assert config_sha256(validate_config(with_value(copy.deepcopy(base), dotted, value))) != digest, dotted


def test_seeded_noise_is_not_private(base: dict[str, Any]) -> None:
    assert not validate_config(with_value(base, "privacy.noise_seed", 0)).is_private
