"""The rival's side of ``bench_flower_study.py``: the same LoRA task as a Flower app in its simulation.

Runs under a Python with flwr[simulation], torch, transformers, peft and opacus, and imports nothing of ours. It is what
a user writes after Flower's own examples (Message API; ``examples/opacus`` for the private one). Handicaps are taken
away where the recipe has them: a worker loads the model once, not once a round.

Started as ``python -c "import flower_study; flower_study.main()" SETTINGS``; the last line printed is one JSON object.
"""

import json
import random
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

BEGAN, TRAFFIC = "began", "traffic"


@lru_cache(maxsize=1)
def settings() -> dict[str, Any]:
    """What to do; a worker reads it from the folder that the environment names."""
    import os

    return json.loads((Path(os.environ["FLOWER_STUDY"]) / "settings.json").read_text())


@lru_cache(maxsize=1)
def make_model() -> Any:
    """The backbone with LoRA on all linear layers; A frozen from one seed, B trained (FFA-LoRA)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(7)
    base = AutoModelForCausalLM.from_pretrained(settings()["backbone"], dtype=torch.float32)
    rank, alpha = settings()["rank"], settings()["alpha"]
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


def trained(model: Any) -> dict[str, Any]:
    """What travels."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def arrays_of(model: Any) -> ArrayRecord:
    """The trained tensors as Flower sends them."""
    return ArrayRecord({name: parameter.detach().clone() for name, parameter in trained(model).items()})


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One client's local steps."""
    folder = Path(settings()["folder"])
    model = make_model()
    received = message.content["arrays"]
    _load(model, received.to_torch_state_dict())
    (folder / f"{BEGAN}-{time.time():.3f}").touch()
    units = json.loads((folder / f"rows-{context.node_config['partition-id']}.json").read_text())
    (_private_steps if settings()["noise"] is not None else _plain_steps)(model, units)
    sent = arrays_of(model)
    with (folder / TRAFFIC).open("a") as log:
        log.write(f"{received.count_bytes()} {sent.count_bytes()}\n")
    return Message(content=RecordDict({"arrays": sent, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


server = ServerApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Average over all clients, round after round."""
    model = make_model()
    clients = settings()["clients"]
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    result = strategy.start(grid=grid, initial_arrays=arrays_of(model), num_rounds=settings()["rounds"])
    moved = sum(float(one.abs().sum()) for one in result.arrays.to_torch_state_dict().values())
    (Path(settings()["folder"]) / "result.json").write_text(json.dumps({"ended": time.time(), "moved": moved}))


def _load(model: Any, state: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(state[name])


def _losses(model: Any, rows: list[dict[str, list[int]]]) -> Any:
    """One mean loss per row."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[place, :n], labels[place, :n], mask[place, :n] = (
            torch.tensor(row["input_ids"]),
            torch.tensor(row["labels"]),
            1,
        )
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    wanted = labels[:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
    return each.sum(1) / (wanted != -100).sum(1).clamp(min=1)


def _plain_steps(model: Any, units: list[list[dict[str, list[int]]]]) -> None:
    import torch

    of = settings()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=of["learning_rate"], weight_decay=0.0)
    model.train()
    for _ in range(of["steps"]):
        batch = [random.choice(unit) for unit in random.sample(units, of["batch"])]
        optimizer.zero_grad()
        for start in range(0, len(batch), of["microbatch"]):
            (_losses(model, batch[start : start + of["microbatch"]]).sum() / len(batch)).backward()
        optimizer.step()


def _private_steps(model: Any, units: list[list[dict[str, list[int]]]]) -> None:
    """Opacus as its documentation says: make_private with a Poisson loader, and a memory manager for microbatches."""
    import torch
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    of = settings()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=of["learning_rate"], weight_decay=0.0)
    model.train()
    loader = torch.utils.data.DataLoader(units, batch_size=of["batch"], collate_fn=lambda one: one)
    wrapped, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=of["noise"], max_grad_norm=of["clip"]
    )
    done = 0
    while done < of["steps"]:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=of["microbatch"], optimizer=optimizer
        ) as pieces:
            for piece in pieces:
                optimizer.zero_grad()
                last = not optimizer._check_skip_next_step(pop_next=False)
                _losses(wrapped, [random.choice(unit) for unit in piece]).mean().backward()
                optimizer.step()
                done += last
                if done == of["steps"]:
                    break
    wrapped.to_standard_module()


def main() -> None:
    """The whole study; ``FLOWER_STUDY`` names the folder with settings and rows."""
    of = settings()
    one_at_a_time = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": of["at_once"]}}
    run_simulation(server, client, num_supernodes=of["clients"], backend_config=one_at_a_time)
    folder = Path(of["folder"])
    result = json.loads((folder / "result.json").read_text())
    traffic = [tuple(map(int, line.split())) for line in (folder / TRAFFIC).read_text().splitlines()]
    print(
        json.dumps(
            {
                "began": min(float(one.name.removeprefix(f"{BEGAN}-")) for one in folder.glob(f"{BEGAN}-*")),
                "ended": result["ended"],
                "bytes_per_round": sum(down + up for down, up in traffic) / of["rounds"],
                "trained": len(traffic),
                "moved": result["moved"],
            }
        ),
        file=sys.stdout,
        flush=True,
    )
