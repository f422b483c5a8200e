"""What makes DP-LoRA learn at the sizes that ship: one setting changed at a time, on invented text, so tuning is free.

One client trains once on an invented corpus (nobody wrote it, so no person's budget is spent on choosing), with noise
calibrated to the same (epsilon, delta) whatever the setting, and is measured on posts it did not see: perplexity of the
reference answers, and F1 of the yes or no that it would answer (the likelier of both as the first word).

Settings are visited seed by seed, so a run that is stopped has every setting equally often. Results go to a JSON file
after each run, and a second start goes on from it.

Example:
    python infra/studies/utility_under_privacy.py --out runs/utility.json --minutes 20
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedmentor_core.adapters.lora import attach, load_state, trainable_parameters
from fedmentor_core.config import AdapterConfig, StudyConfig
from fedmentor_core.config_io import load_config
from fedmentor_core.evaluation.labels import label_f1, parse_label
from fedmentor_core.evaluation.perplexity import log_losses, perplexity
from fedmentor_core.privacy.accountant import calibrate_at_order, choose_order, rdp_cap
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.training.client import LocalRound, train_locally
from fedmentor_core.workspace import Workspace

CORPUS, N_UNITS = "peer-support", 3000
OTHER = "student-counselling"  # what public pre-adaptation learns from


@dataclass(frozen=True)
class Setting:
    """One way to train under privacy; the defaults are where every other one starts from."""

    factor: str = "base"
    epsilon: float | None = 8.0  # None: without privacy
    batch_size: int = 96
    steps: int = 12
    clip_norm: float = 0.1
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 0.02
    train: str = "b"
    targets: str = "all-linear"
    last_layers: int | None = None
    first_token_weight: float = 0.7
    warm_start_steps: int = 0  # without privacy, on another, public corpus
    averaged: bool = False  # mean of the second half's iterates; post-processing, so free

    @property
    def name(self) -> str:
        """The factor and what is different."""
        changed = {k: v for k, v in asdict(self).items() if k != "factor" and v != getattr(BASE, k)}
        return self.factor + "".join(f" {key}={value}" for key, value in changed.items())


BASE = Setting()
BEST = replace(BASE, factor="curve", steps=24, rank=16, alpha=32, learning_rate=0.04)
"""What the factors, each alone, say is best; the curve over epsilon is drawn with it."""


TARGETS: dict[str, Any] = {
    "all-linear": "all-linear",
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def settings() -> Iterator[Setting]:
    """Base first, then factor by factor, then the curve over epsilon at the best of them."""
    yield BASE
    yield from (replace(BASE, factor="batch", batch_size=b, steps=96 * 12 // b) for b in (32, 192, 384))
    yield from (replace(BASE, factor="steps", steps=s) for s in (6, 24))
    yield from (replace(BASE, factor="rate", learning_rate=r) for r in (0.005, 0.01, 0.04, 0.08))
    yield from (replace(BASE, factor="clip", clip_norm=c) for c in (0.01, 1.0, 10.0))
    yield from (replace(BASE, factor="rank", rank=r, alpha=2 * r) for r in (2, 4, 16))
    yield from (replace(BASE, factor="alpha", alpha=a) for a in (8, 32))
    yield from (replace(BASE, factor="factors", train=t) for t in ("both", "core"))
    yield from (replace(BASE, factor="placement", targets=t) for t in ("attention", "mlp"))
    yield replace(BASE, factor="placement", last_layers=2)
    yield from (replace(BASE, factor="first token", first_token_weight=w) for w in (0.0, 0.4, 0.9))
    yield from (replace(BASE, factor="warm start", warm_start_steps=s) for s in (6, 12))
    yield replace(BASE, factor="averaging", averaged=True)
    yield from (replace(BEST, epsilon=e) for e in (8.0, 4.0, 2.0, 1.0, 0.5, None))


def study(folder: str) -> Workspace:
    """The invented corpora in the quickstart's form."""
    config = load_config(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
    domains = [
        domain.model_copy(update={"source": domain.source.model_copy(update={"n_units": N_UNITS})})
        for domain in config.domains
        if domain.name in (CORPUS, OTHER)
    ]
    changed: StudyConfig = config.model_copy(
        update={
            "domains": domains,
            "evaluation": config.evaluation.model_copy(update={"max_test_examples": 300}),
        }
    )
    return Workspace(StudyRef(config=changed, run_id="utility", out_dir=folder))


def noise_of(setting: Setting, n_units: int) -> float | None:
    """Sigma for the setting's epsilon, at delta = 1 / (10 N)."""
    if setting.epsilon is None:
        return None
    rate, delta = setting.batch_size / n_units, 0.1 / n_units
    order = choose_order(setting.epsilon, delta, rate, setting.steps)
    return calibrate_at_order(rdp_cap(setting.epsilon, delta, order), order, rate, setting.steps)


def train(workspace: Workspace, setting: Setting, seed: int) -> tuple[Any, float | None]:
    """The trained model, and the noise multiplier."""
    adapter = AdapterConfig(
        rank=setting.rank,
        alpha=setting.alpha,
        train=setting.train,  # type: ignore[arg-type]
        target_modules=TARGETS[setting.targets],
        last_layers=setting.last_layers,
    )
    model = attach(workspace.backbone, adapter, seed=seed)
    sections = {
        "learning_rate": setting.learning_rate,
        "first_token_weight": setting.first_token_weight,
        "microbatch_size": 16,
    }
    training = workspace.config.training.model_copy(update=sections)
    if setting.warm_start_steps:
        other = workspace.training_set(OTHER)
        first = LocalRound(
            96 / other.n_units, setting.warm_start_steps, None, setting.clip_norm, order_seed=seed + 1000
        )
        train_locally(model, other, training, first, device="cpu")
    data = workspace.training_set(CORPUS)
    noise = noise_of(setting, data.n_units)
    kept: list[list[Any]] = []

    def keep(done: int, total: int) -> None:
        if setting.averaged and done > total // 2:
            kept.append([p.detach().clone() for p in trainable_parameters(model).values()])

    # Seeded noise: nothing here is private, and every setting meets the same draws.
    plan = LocalRound(
        setting.batch_size / data.n_units, setting.steps, noise, setting.clip_norm, order_seed=seed, noise_seed=seed
    )
    train_locally(model, data, training, plan, device="cpu", on_step=keep)
    if kept:
        names = trainable_parameters(model)
        load_state(
            model, {name: torch.stack(p).mean(0) for name, p in zip(names, zip(*kept, strict=True), strict=True)}
        )
    return model, noise


def measure(workspace: Workspace, model: Any) -> tuple[float, float]:
    """Perplexity of the references and F1 of the likelier answer word, on the test set."""
    tokenizer = workspace.backbone.tokenizer
    rows = workspace.evaluation_set(CORPUS, "test")
    losses, counts = log_losses(model, tokenizer, rows.targets, batch_size=8, device="cpu")
    words = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
    gold = [str(parse_label(row["response"])) for row in rows.rows]
    said = []
    with torch.inference_mode():
        for prompt in rows.prompts:
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
            said.append("yes" if logits[words[0]] > logits[words[1]] else "no")
    return perplexity(losses, counts) or math.inf, label_f1(gold, said)


def summary(done: list[dict[str, Any]]) -> str:
    """Markdown: mean (and half the range) over seeds per setting."""
    lines = ["| setting | noise multiplier | perplexity | label F1 | runs |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in done):
        runs = [run for run in done if run["name"] == name]

        def said(key: str, digits: int, runs: list[dict[str, Any]] = runs) -> str:
            values = [run[key] for run in runs]
            return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"

        noise = runs[0]["noise_multiplier"]
        lines.append(
            f"| {name} | {'none' if noise is None else f'{noise:.2f}'} | {said('perplexity', 2)} | "
            f"{said('label_f1', 3)} | {len(runs)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON with every run; a table is printed")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after this many (default 20)")
    parser.add_argument("--seeds", type=int, default=3, help="most runs of each setting (default 3)")
    parser.add_argument("--only", help="factors, comma separated, such as 'rate,clip'")
    arguments = parser.parse_args()
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    wanted = None if arguments.only is None else {"base", *arguments.only.split(",")}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workspace = study(folder)
        if not any(run["name"] == "untrained" for run in done):
            untrained = attach(workspace.backbone, AdapterConfig(rank=8), seed=0)
            found = measure(workspace, untrained)
            done.append(
                {"name": "untrained", "seed": 0, "noise_multiplier": None, "perplexity": found[0], "label_f1": found[1]}
            )
        for seed in range(arguments.seeds):
            for setting in settings():
                if wanted is not None and setting.factor not in wanted:
                    continue
                if any((run["name"], run["seed"]) == (setting.name, seed) for run in done):
                    continue
                if time.monotonic() - started > 60 * arguments.minutes:
                    break
                begun = time.monotonic()
                model, noise = train(workspace, setting, seed)
                found = measure(workspace, model)
                run = {"name": setting.name, "seed": seed, "noise_multiplier": noise, "perplexity": found[0]}
                done.append({**run, "label_f1": found[1], "seconds": round(time.monotonic() - begun, 1)})
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(done, indent=1))
                print(f"{seed} {setting.name}: perplexity {found[0]:.2f}, label F1 {found[1]:.3f}", flush=True)
    print(summary(done))


if __name__ == "__main__":
    main()
