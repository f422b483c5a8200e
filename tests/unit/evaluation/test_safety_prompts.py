"""Safety prompts: the shipped ones, the real files, bad files, and how a backbone is asked."""

import os
from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.adapters.backbone import load_backbone
from fedmentor_core.config import BackboneConfig, EvaluationConfig, SafetyPromptsConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError, DataError
from fedmentor_core.evaluation import safety
from fedmentor_core.evaluation.safety_prompts import PromptSet, read_prompt_sets
from fedmentor_core.evaluation.scores import Scorers

DATA = Path(os.environ.get("FEDMENTOR_DATA_ROOT", Path(__file__).resolve().parents[4] / "shared" / "data"))
data = pytest.mark.skipif(not (DATA / "safety").is_dir(), reason="no real data: set FEDMENTOR_DATA_ROOT")


def test_the_shipped_prompts_are_balanced_and_distinct() -> None:
    (found,) = read_prompt_sets(SafetyPromptsConfig(), None)
    assert len(found.unsafe) == len(found.safe) == 12
    assert len({*found.unsafe, *found.safe}) == 24
    assert len(found.sha256) == 64


@data
@pytest.mark.data
def test_the_real_sets_have_their_published_sizes() -> None:
    config = SafetyPromptsConfig(kinds=("simple_safety_tests", "xstest"), max_prompts=1000)
    simple, xstest = read_prompt_sets(config, str(DATA))
    assert (len(simple.unsafe), len(simple.safe)) == (100, 0)
    assert (len(xstest.unsafe), len(xstest.safe)) == (200, 250)


def write(folder: Path, text: str) -> Path:
    (folder / "xstest_prompts.csv").write_text(text)
    return folder


def test_a_part_is_spread_over_the_file(tmp_path: Path) -> None:
    lines = [f"{i},prompt {i},{'safe' if i % 2 else 'unsafe'}" for i in range(40)]
    write(tmp_path, "\n".join(["id,prompt,label", *lines]) + "\n")
    config = SafetyPromptsConfig(kinds=("xstest",), folder=str(tmp_path), max_prompts=4)
    (found,) = read_prompt_sets(config, None)
    assert found.unsafe == ("prompt 0", "prompt 10", "prompt 20", "prompt 30")
    assert found.safe == ("prompt 1", "prompt 11", "prompt 21", "prompt 31")


@pytest.mark.parametrize(
    ("text", "said"),
    [("id,prompt\n1,x\n", "no column 'label'"), ("id,prompt,label\n1,x,maybe\n", "label is 'maybe'"), ("", "empty")],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    config = SafetyPromptsConfig(kinds=("xstest",), folder=str(write(tmp_path, text)))
    with pytest.raises(DataError, match=said):
        read_prompt_sets(config, None)


def test_a_missing_folder_or_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = SafetyPromptsConfig(kinds=("xstest",))
    with pytest.raises(ConfigError, match=r"data\.root is not set.*kinds \[embedded\]"):
        read_prompt_sets(config, None)
    with pytest.raises(DataError, match=r"xstest_prompts\.csv.*does not exist"):
        read_prompt_sets(config, str(tmp_path))


@pytest.mark.parametrize(
    "bad",
    [{"kinds": []}, {"kinds": ["advbench"]}, {"kinds": ["xstest", "xstest"]}, {"max_prompts": 0}, {"prompts": 3},
     {"max_new_tokens": 160}],
)  # fmt: skip
def test_impossible_settings_are_refused(tiny_study: dict, bad: dict) -> None:
    tiny_study["evaluation"]["safety_prompts"] = bad
    with pytest.raises(ConfigError, match="safety_prompts"):
        validate_config(tiny_study)


class Parrot:
    """In the place of the model's text: what is tested is how answers are counted."""

    def __init__(self, *outputs: str) -> None:
        self.outputs = list(outputs)

    def __call__(self, *_: Any, **__: Any) -> list[str]:
        return self.outputs


def test_rates_by_hand(monkeypatch: pytest.MonkeyPatch, tiny_backbone_folder: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny_backbone_folder), max_length=160))
    refusal = "I'm sorry, but I can't help with that."
    monkeypatch.setattr(safety, "generate", Parrot(refusal, "Sure, like this.", refusal, "Open the door.", "", "Yes."))
    sets = [PromptSet("xstest", ("a", "b"), ("c", "d", "e")), PromptSet("simple_safety_tests", ("f",), ())]
    found = safety.evaluate_safety(
        backbone.model, backbone.tokenizer, sets, Scorers.load(EvaluationConfig(gate_data="public")), SafetyPromptsConfig(),
        device="cpu", max_length=160, batch_size=4,
    )  # fmt: skip
    first, second = found.sets
    assert first.unsafe_refusal_rate == 0.5
    assert first.over_refusal_rate == pytest.approx(1 / 3)
    assert first.empty_rate == pytest.approx(1 / 5)
    assert first.safe_rate == 1.0
    assert first.intervals["over_refusal_rate"] == (0.0, 1.0)
    assert (second.unsafe_refusal_rate, second.over_refusal_rate) == (0.0, None)
    assert "over_refusal_rate" not in second.intervals


def test_a_chat_template_is_used_where_there_is_one(tiny_backbone_folder: Path) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(load_backbone(BackboneConfig(name=str(tiny_backbone_folder), max_length=160)).tokenizer)
    plain = safety.encode_requests(tokenizer, ["How are you?"], max_length=160, max_new_tokens=8)
    assert (
        tokenizer.decode(plain[0]) == f'Consider this post: "How are you?" Question: {safety.PLAIN_QUESTION}\nAnswer:'
    )
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<bot>"
    chat = safety.encode_requests(tokenizer, ["How are you?"], max_length=160, max_new_tokens=8)
    assert tokenizer.decode(chat[0]) == "<user>How are you?</user><bot>"
    with pytest.raises(ConfigError, match=r"backbone\.max_length: got 40"):
        safety.encode_requests(tokenizer, ["How are you? " * 20], max_length=40, max_new_tokens=8)
