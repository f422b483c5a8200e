"""What a DP-SGD step costs beside the same step without privacy, and beside what users would pick instead.

Every arm takes one optimizer step on the same rows with the same Llama-style model (random weights: what is timed does
not depend on them) and the same adapter: LoRA on all linear layers, A frozen, B trained. The logical batch is one
microbatch, so that batch and length are the same for all. ``production`` arms are the very functions that a client runs.
"""

import importlib.util
from functools import partial
from typing import Any

from harness import Arm, Plan, Ratio, Scale, SkipArmError, Turn, benchmark

RANK, CLIP, NOISE = 16, 0.1, 1.0
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden": 256, "inner": 640, "layers": 4, "heads": 8, "vocabulary": 4096},
    "medium": {"hidden": 512, "inner": 1408, "layers": 8, "heads": 8, "vocabulary": 8192},
    "1.7B": {"hidden": 2048, "inner": 8192, "layers": 24, "heads": 32, "vocabulary": 49_152},
}
TIME_TARGET, MEMORY_TARGET = 1.05, 1.10
SHAPES = ((8, 64), (32, 64), (8, 256))  # rows, tokens


def _plan(rows: int, tokens: int, scale: Scale, *, size: str = "small", device: str = "cpu") -> Plan:
    shape: dict[str, Any] = {"rows": rows, "tokens": tokens, "size": size, "device": device}
    rivals = {"Trainer and peft, no privacy": trainer, "Opacus hooks": opacus_hooks, "Opacus ghost": opacus_ghost,
              "dp-lora": dp_lora}  # fmt: skip
    arms = [
        Arm("ours, no privacy", production, {"private": False, **shape}),
        Arm("ours, private", production, {"private": True, **shape}),
        Arm("ours, private, bfloat16", production, {"private": True, "autocast": True, **shape}),
        Arm("ours, no privacy, bfloat16", production, {"private": False, "autocast": True, **shape}),
        Arm("ours, private, checkpointed", production, {"private": True, "checkpointed": True, **shape}),
        *(Arm(name, prepare, shape) for name, prepare in rivals.items()),
    ]
    time = partial(Ratio, what="cpu_seconds" if device == "cpu" else "seconds")
    ratios = [
        time("time of privacy", of="ours, private", to="ours, no privacy", at_most=TIME_TARGET),
        Ratio("memory of privacy", "ours, private", "ours, no privacy", what="peak_bytes", at_most=MEMORY_TARGET),
        time("time of privacy, bfloat16", "ours, private, bfloat16", "ours, no privacy, bfloat16", at_most=TIME_TARGET),
        Ratio("memory of checkpointing", of="ours, private, checkpointed", to="ours, private", what="growth_bytes"),
        *(time(f"time over {name}", of="ours, private", to=name, at_most=1.0) for name in rivals),
        *(Ratio(f"memory over {name}", of="ours, private", to=name, what="growth_bytes") for name in rivals),
    ]
    notes = [f"{rows} rows of {tokens} tokens, rank {RANK}, model {shape['size']!r}, half of the tokens are targets."]
    notes.append("On the processor, ratios of time are of processor time.")
    turns = 2 if scale.quick else max(9, 15 * 8 * 64 // (rows * tokens))
    return Plan(arms, ratios, turns=turns, warm_up=1, notes=notes)


def _register(rows: int, tokens: int) -> None:
    @benchmark(f"dp-step-{rows}x{tokens}", title=f"a step on {rows} rows of {tokens} tokens", minutes=1.5)
    def plan(scale: Scale) -> Plan:
        return _plan(rows, tokens, scale)


for _shape in SHAPES:
    _register(*_shape)


@benchmark("dp-step-1.7B", title="a step of a 1.7B client at 512 tokens, bfloat16", minutes=5.0, gpu=True, cpu=False)
def large(scale: Scale) -> Plan:
    """The target is 24 GB for a logical batch of 64 in microbatches; see also ``bench_memory_model.py``."""
    shape: dict[str, Any] = {"rows": 8, "tokens": 512, "size": "1.7B", "device": "cuda", "autocast": True}
    arms = [
        Arm("ours, no privacy", production, {"private": False, **shape}),
        Arm("ours, private", production, {"private": True, **shape}),
        Arm("ours, no privacy, checkpointed", production, {"private": False, "checkpointed": True, **shape}),
        Arm("ours, private, checkpointed", production, {"private": True, "checkpointed": True, **shape}),
    ]
    ratios = [
        Ratio("time of privacy", of="ours, private", to="ours, no privacy", at_most=TIME_TARGET),
        Ratio("memory of privacy", "ours, private", "ours, no privacy", what="peak_bytes", at_most=MEMORY_TARGET),
        Ratio("time of privacy, checkpointed", "ours, private, checkpointed", "ours, no privacy, checkpointed"),
    ]
    return Plan(arms, ratios, turns=2 if scale.quick else 10, warm_up=3)


# --- the model and the rows ---------------------------------------------------------------------------------------------


def backbone(size: str, device: str, *, bfloat16: bool = False) -> Any:
    """A frozen random model without tokenizer; on a GPU its weights are bfloat16, as a real client's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedmentor_core.adapters.backbone import Backbone

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16 if bfloat16 else torch.float32)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    return Backbone("random", None, "0" * 64, model, None, device)


def adapted(size: str, device: str, *, bfloat16: bool = False) -> Any:
    """The model with the adapter that clients train."""
    from fedmentor_core.adapters.lora import attach
    from fedmentor_core.config import AdapterConfig

    return attach(backbone(size, device, bfloat16=bfloat16), AdapterConfig(rank=RANK, alpha=32.0, train="b"), seed=1)


def tokens_of(rows: int, tokens: int, size: str) -> tuple[Any, Any]:
    """Random tokens (rows, tokens); labels -100 on the first half."""
    import torch

    ids = torch.randint(5, SIZES[size]["vocabulary"], (rows, tokens), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return ids, labels


def _adamw(model: Any) -> Any:
    from torch.optim import AdamW

    return AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)


# --- arms ---------------------------------------------------------------------------------------------------------------


def production(
    rows: int,
    tokens: int,
    size: str,
    device: str,
    private: bool,
    autocast: bool = False,
    checkpointed: bool = False,
    model: Any = None,
) -> Turn:
    """The step that a client takes (``training/client.py``), with or without privacy; of ``model`` where one is given."""
    from fedmentor_core.adapters.fused import fused
    from fedmentor_core.privacy.engine import make_private_optimizer, private_model
    from fedmentor_core.training.checkpointing import checkpointing
    from fedmentor_core.training.client import TrainingSet, _microbatches, _plain_step, _private_step, _weighted_losses

    model = adapted(size, device, bfloat16=device == "cuda") if model is None else model
    optimizer, wrapped = _adamw(model), model
    if private:
        wrapped = private_model(model)
        optimizer = make_private_optimizer(
            optimizer, noise_multiplier=NOISE, clip_norm=CLIP, expected_units=rows, device=device
        )
    wrapped.train()
    ids, labels = tokens_of(rows, tokens, size)
    data = TrainingSet(ids.tolist(), labels.tolist(), [[row] for row in range(rows)], pad_id=0)
    loss = partial(_weighted_losses, wrapped, 0.7, autocast=autocast)
    drawn = [(row, row) for row in range(rows)]

    def turn() -> None:
        batches = _microbatches(drawn, data, rows, device)
        with checkpointing(model, enabled=checkpointed), fused(model, enabled=not private):
            if private:
                _private_step(optimizer, batches, loss)
            else:
                _plain_step(optimizer, batches, loss, float(rows))

    return turn


def trainer(rows: int, tokens: int, size: str, device: str) -> Turn:
    """One step of transformers' Trainer over the same peft model: what most people fine-tune with, no privacy."""
    import tempfile

    import torch
    from transformers import Trainer, TrainingArguments

    model = adapted(size, device)
    ids, labels = tokens_of(rows, tokens, size)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    folder = tempfile.TemporaryDirectory()
    arguments = TrainingArguments(
        folder.name, per_device_train_batch_size=rows, max_steps=1, report_to=[], use_cpu=device == "cpu"
    )
    first = {name: tensor[0] for name, tensor in batch.items()}
    made = Trainer(model, arguments, train_dataset=[first], optimizers=(_adamw(model), None))
    made.create_scheduler(1000, made.optimizer)
    made.current_gradient_accumulation_steps = 1  # what its own loop sets before a step

    def turn() -> None:
        made.training_step(model, dict(batch))
        made.optimizer.step()
        made.optimizer.zero_grad(set_to_none=True)
        assert folder is not None

    return turn


def _rows_loss(model: Any, ids: Any, labels: Any) -> Any:
    """(B,) mean losses of the rows' targets by torch's cross entropy, logits only where there is a target, as ours."""
    import torch

    base = getattr(model, "_module", model).get_base_model()
    targets = labels[:, 1:]
    wanted = targets != -100
    hidden = base.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
    logits = base.get_output_embeddings()(hidden[:, :-1][wanted])
    losses = torch.nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
    row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(targets)[wanted]
    return torch.zeros(len(ids), device=ids.device).index_add(0, row, losses / wanted.sum(dim=1)[row])


def opacus_hooks(rows: int, tokens: int, size: str, device: str) -> Turn:
    """Opacus as its tutorial has it: a gradient per sample from hooks, all kept until the step."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(adapted(size, device), batch_first=True, loss_reduction="sum", strict=False)
    model.train()
    optimizer = DPOptimizer(
        _adamw(model), noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=rows, loss_reduction="sum"
    )
    ids, labels = tokens_of(rows, tokens, size)

    def turn() -> None:
        _rows_loss(model, ids, labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return turn


def opacus_ghost(rows: int, tokens: int, size: str, device: str) -> Turn:
    """Opacus' ghost clipping: norms in a first backward pass, the clipped sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    model = GradSampleModuleFastGradientClipping(
        adapted(size, device), batch_first=True, loss_reduction="sum", strict=False, max_grad_norm=CLIP
    )
    model.train()
    optimizer = DPOptimizerFastGradientClipping(
        _adamw(model), noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=rows, loss_reduction="sum"
    )
    ids, labels = tokens_of(rows, tokens, size)

    def turn() -> None:
        DPTensorFastGradientClipping(model, optimizer, _rows_loss(model, ids, labels), "sum").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return turn


def dp_lora(rows: int, tokens: int, size: str, device: str) -> Turn:
    """The package dp-lora, method 'ffa', by its own engine."""
    if importlib.util.find_spec("dp_lora") is None:
        raise SkipArmError("dp-lora is not installed (pip install dp-lora, or put it on PYTHONPATH)")
    from dp_lora import DPLoRAEngine
    from torch.utils.data import DataLoader, TensorDataset

    model = adapted(size, device).train()
    ids, labels = tokens_of(rows, tokens, size)
    loader = DataLoader(TensorDataset(ids, labels), batch_size=rows)
    engine = DPLoRAEngine()
    model, optimizer, _ = engine.make_private(
        model=model,
        optimizer=_adamw(model),
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        method="ffa",
        poisson_sampling=False,
    )

    def turn() -> None:
        _rows_loss(model, ids, labels).sum().backward()
        optimizer.step(engine.grad_sample_module.get_per_sample_grads())
        engine.grad_sample_module.clear_per_sample_grads()
        optimizer.zero_grad()

    return turn
