import hashlib
import json
import re
from pathlib import Path

import pytest

import fedmentor_core
from fedmentor_core.data.prompting import ANSWER_PREFIX, build_completion, build_prompt

FOLDER = Path(fedmentor_core.__file__).parent / "assets" / "backbone"
CASES = (
    ("My cat sleeps next to me and it is lovely. I paid the rent on Friday.", "Does the writer enjoy their pet?"),
    ("I cannot sleep and I lie awake until four every night.", "Does the poster sleep well?"),
    ("I started as a nurse in April and I love it. The sun on Monday was lovely.", "Does the author like their job?"),
    ("My brother yells at me every Sunday and I cannot stand it.", "Does the person mention a pet?"),
)


@pytest.fixture(scope="module")
def backbone():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()
    return model, tokenizer


def test_prompt_form_is_the_one_the_backbone_was_trained_on():
    assert build_prompt("A b.", "C d?") == 'Consider this post: "A b." Question: C d?\nAnswer:'
    assert build_completion("Yes, x.") == " Yes, x." == ANSWER_PREFIX + "Yes, x."


def test_folder_is_small_and_holds_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 9_500_000
    assert {path.name for path in files} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_card_states_the_digest_of_the_weights():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest in card
    assert "build_backbone.py --data-root" in card
    assert "Not for clinical use" in card


def test_no_machine_path_is_left_in_the_files():
    for path in FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|work|root|tmp|Users)/", text) or path.name == "tokenizer.json", path.name
    assert json.loads((FOLDER / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_model_and_tokenizer_fit_together(backbone):
    model, tokenizer = backbone
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length <= model.config.max_position_embeddings
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    assert 3_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 4_500_000
    ids = tokenizer("Yes, the writer.")["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_text_survives_the_tokenizer(backbone):
    _, tokenizer = backbone
    text = build_prompt('She said "ça va" 🙂\n\tand left.', "Does the caller want us to call back?") + " No, 12."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompt_and_completion_tokenise_the_same_apart_and_together(backbone):
    _, tokenizer = backbone
    for post, question in CASES:
        prompt, completion = build_prompt(post, question), build_completion("Yes, the writer does. Reasoning: so.")
        apart = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
        assert apart == tokenizer(prompt + completion)["input_ids"]


def test_greedy_responses_have_the_form_and_end(backbone):
    import torch

    model, tokenizer = backbone
    inputs = tokenizer(
        [build_prompt(post, question) for post, question in CASES],
        return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False,
    )  # fmt: skip
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=80, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    for text in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :]):
        assert tokenizer.eos_token in text, text
        response = text.split(tokenizer.eos_token)[0]
        assert re.fullmatch(r" (Yes|No), the [^.]+\. Reasoning: [A-Z].+", response), response
        words = re.findall(r"[a-z']+", response.lower())
        assert 8 <= len(words) <= 60
        assert len(set(words)) > 0.5 * len(words), response
