"""A plan that reads a backbone's files is the plan that loads the backbone; what it cannot read, it loads."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.adapters.backbone import embedded_backbone_folder
from fedmentor_core.adapters.lora import adapter_state, attach, resolved_targets, trained_factors, trained_part
from fedmentor_core.adapters.shapes import cut_shapes, shapes_from_files, trained_shapes
from fedmentor_core.config import AdapterConfig, BackboneConfig
from fedmentor_core.config_io import load_config
from fedmentor_core.errors import BackboneError
from fedmentor_core.study_ref import find_study
from fedmentor_core.wire.envelope import shapes_of
from fedmentor_core.workspace import Workspace

CONFIGS = Path(__file__).resolve().parents[2] / "infra" / "configs"
POSTS = "domains.{index}.source={{kind: invented, corpus: peer_forum, n_units: {n_units}}}"
ADAPTERS = {
    "all": {},
    "one rank": {"rank": 3, "alpha": 6},
    "both factors": {"train": "both"},
    "alternating": {"train": "alternate"},
    "core": {"train": "core", "rank": 4},
    "core in the weights": {"train": "core", "rank": 4, "core_init": "weights"},
    "named": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "last layers": {"last_layers": 2},
    "named in last layers": {"last_layers": 1, "target_modules": ["v_proj"]},
}
BY_FAMILY = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}


@pytest.fixture
def without_prv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)


@pytest.mark.usefixtures("without_prv")
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_planned_the_same_from_files(path: Path, tmp_path: Path) -> None:
    """On the embedded backbone and invented posts, whatever the file names; domains at sites are nobody's to plan."""
    here = [index for index, domain in enumerate(load_config(path).domains) if domain.site is None]
    config = load_config(path, [POSTS.format(index=index, n_units=400 + index) for index in here])
    backbone = config.backbone.model_copy(update={"name": "embedded", "revision": None, "device": "auto"})
    config = config.model_copy(update={"backbone": backbone})
    workspace = Workspace(find_study(config, tmp_path / "out"))
    assert workspace.make_plan(from_files=True) == workspace.make_plan()


@pytest.mark.parametrize("case", ADAPTERS)
def test_shapes_are_those_of_the_attached_adapter(case: str) -> None:
    same_as_attached(BackboneConfig(), AdapterConfig.model_validate({"rank": 8, "alpha": 16, **ADAPTERS[case]}))


@pytest.mark.parametrize("family", BY_FAMILY)
def test_shapes_are_right_for_every_known_family(family: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / family, family)
    same_as_attached(BackboneConfig(name=str(folder)), AdapterConfig(rank=4, alpha=8))


def test_a_clients_part_has_the_shapes_of_its_tensors() -> None:
    import torch

    state = {f"m.lora_{factor}.weight": torch.zeros(*shape) for factor, shape in {"A": (8, 5), "B": (7, 8)}.items()}
    for train, round_index in (("b", 0), ("both", 0), ("alternate", 0), ("alternate", 1)):
        config = AdapterConfig(rank=3, alpha=6, train=train)
        expected = shapes_of(trained_part(state, config, round_index))
        assert trained_shapes(shapes_of(state), config, round_index) == expected
    assert cut_shapes(shapes_of(state), 100) == shapes_of(state)


@pytest.mark.parametrize("spoil", ["family", "torn", "quantised", "layers", "unreadable"])
def test_files_that_say_something_unexpected_say_nothing(spoil: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    config, weights = folder / "config.json", folder / "model.safetensors"
    facts = json.loads(config.read_text())
    assert shapes_from_files(BackboneConfig(name=str(folder)), AdapterConfig()) is not None
    match spoil:
        case "family":
            facts["model_type"] = "gpt2"
        case "torn":
            weights.write_bytes(weights.read_bytes()[:-2])
        case "quantised":
            facts["quantization_config"] = {"quant_method": "bitsandbytes"}
        case "layers":
            facts["num_hidden_layers"] = 3
        case "unreadable":
            weights.write_bytes(b"\xff" * 64)
    config.write_text(json.dumps(facts))
    assert shapes_from_files(BackboneConfig(name=str(folder)), AdapterConfig()) is None


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["no_such"]},
        {"target_modules": ["lm_head"]},
        {"last_layers": 99},
        {"train": "core", "rank": 512},
    ],
    ids=str,
)
def test_an_adapter_that_would_be_refused_is_left_to_whoever_refuses_it(adapter: dict[str, Any]) -> None:
    assert shapes_from_files(BackboneConfig(), AdapterConfig.model_validate({"alpha": 16, **adapter})) is None


def test_a_hub_name_says_nothing_and_a_wrong_pin_is_refused() -> None:
    assert shapes_from_files(BackboneConfig(name="someone/model"), AdapterConfig()) is None
    with pytest.raises(BackboneError, match="expected weights sha256"):
        shapes_from_files(BackboneConfig(sha256="0" * 64), AdapterConfig())


def same_as_attached(backbone: BackboneConfig, adapter: AdapterConfig) -> None:
    """Names, shapes, modules and digest, against peft's model on the loaded backbone."""
    from fedmentor_core.adapters.backbone import load_backbone

    loaded = load_backbone(backbone)
    model = attach(loaded, adapter, seed=0)
    state = shapes_of(adapter_state(model, trainable_only=False))
    found = shapes_from_files(backbone, adapter)
    assert found is not None
    assert {**found.trained, **found.frozen} == state
    changing = trained_factors(adapter.train, 0) | trained_factors(adapter.train, 1)
    assert set(found.trained) == {name for name in state if any(f"lora_{one}." in name for one in changing)}
    assert found.targets == resolved_targets(model)
    assert found.backbone_sha256 == loaded.sha256


def tiny_model(folder: Path, family: str) -> Path:
    """A model of a family with two layers and heads that share keys, and the embedded tokenizer."""
    import transformers

    name = BY_FAMILY[family]
    sizes = {
        "vocab_size": 4096, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
        "tie_word_embeddings": family == "llama",
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    for one in ("tokenizer.json", "tokenizer_config.json"):
        (folder / one).write_bytes((embedded_backbone_folder() / one).read_bytes())
    return folder
