"""The traffic of the paper's scale, by the very arithmetic that ``fedmentor plan`` does: no model is loaded."""

from pathlib import Path

import pytest

from fedmentor_core.adapters.lora import factor_name
from fedmentor_core.adapters.shapes import AdapterShapes
from fedmentor_core.config_io import load_config
from fedmentor_core.wire.traffic import Traffic

CONFIG = Path(__file__).resolve().parents[3] / "infra" / "configs" / "mental_health.yaml"
LAYERS, HIDDEN, INNER = 24, 2048, 8192  # SmolLM2-1.7B
MODULES = {  # (out, in)
    **{f"self_attn.{one}_proj": (HIDDEN, HIDDEN) for one in "qkvo"},
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def traffic(upload: str, download: str) -> Traffic:
    config = load_config(CONFIG, [f"wire.upload={upload}", f"wire.download={download}"])
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in MODULES.items()}
    rank = config.adapter.rank
    shapes = AdapterShapes(
        trained={factor_name(module, "B"): (out, rank) for module, (out, _) in modules.items()},
        frozen={factor_name(module, "A"): (rank, into) for module, (_, into) in modules.items()},
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in modules})),
        backbone_sha256="0" * 64,
    )
    return Traffic(config=config, run_id="mental-health-00000000", n_clients=len(config.domains), shapes=shapes)


@pytest.mark.parametrize(
    ("upload", "download", "megabytes"),
    [("fp32", "fp32", 81.83), ("int8", "int8", 21.18), ("int6", "int7", 17.19), ("int4", "int8", 16.39)],
)
def test_a_round_of_one_client_both_ways(upload, download, megabytes):
    found = traffic(upload, download)
    both = (found.bytes_up("dreaddit") + found.bytes_down()) / 1e6
    assert both == pytest.approx(megabytes, abs=0.005)
    assert (both <= 17.3) == (upload in ("int6", "int4"))
