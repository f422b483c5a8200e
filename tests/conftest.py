"""Fixtures shared by all tests: a tiny backbone that any test can afford, and a small study on it."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines are shared and noisy: no example fails because it was slow.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("FEDMENTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "fedmentor"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with them at the end (``--no-loadscope-reorder``)."""
    order = {"e2e": 0, "flows": 1, "infra": 2}
    items.sort(key=lambda item: order.get(item.path.parent.name, 3))


@pytest.fixture(scope="session")
def tiny_backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its own tokenizer, in Hugging Face form."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from fedmentor_core.data import invented

    folder = tmp_path_factory.mktemp("tiny-backbone")
    texts = [
        f"{row['post']} {row['question']} {row['response']}"
        for corpus in invented.CORPORA
        for row in invented.generate(corpus, 60, 1)
    ]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=600, special_tokens=["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=512
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_study(tiny_backbone_folder: Path) -> dict:
    """A plain configuration mapping: two invented domains, two rounds, seconds to run."""
    from fedmentor_core.data import invented

    corpora = list(invented.CORPORA)[:2]
    return {
        "name": "tiny",
        "seed": 3,
        "rounds": 2,
        "backbone": {"name": str(tiny_backbone_folder), "max_length": 160},
        "adapter": {"rank": 4, "alpha": 8.0},
        "domains": [
            {"name": "one", "source": {"kind": "invented", "corpus": corpora[0], "n_units": 60}, "epsilon": 8.0},
            {"name": "two", "source": {"kind": "invented", "corpus": corpora[1], "n_units": 60}, "sensitivity": "high"},
        ],
        "training": {"steps_per_round": 2, "batch_size": 8, "microbatch_size": 4, "max_target_tokens": 40},
        "evaluation": {
            "gate_data": "public",
            "max_gate_examples": 4,
            "max_test_examples": 4,
            "max_new_tokens": 8,
            "thresholds": [{"metric": "toxicity_mean", "at_most": 1.0}],
        },
        "tracking": {"enabled": False},
    }
