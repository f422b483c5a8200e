"""What rounding does to the gate's metrics: the quickstart's first private round, joined and evaluated in several codecs.

The round is trained once under seeded noise. In every turn its three updates and their mean are rounded by coins of
their own, and the joined adapter answers up to 400 gate rows a domain. All that differs from full precision is rounding.
A greedy answer changes as a whole once one word does, so a metric's change scatters from coins to coins; what is
concluded is the mean over coins, and how far it may be off by two standard errors of it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness import Arm, Finding, Plan, Sample, Scale, Turn, benchmark

QUICKSTART = Path(__file__).resolve().parents[2] / "infra" / "configs" / "quickstart.yaml"
PAIRS = {
    "int8": ("int8", "int8"),
    "int6 up, int7 down": ("int6", "int7"),
    "int4 up, int8 down": ("int4", "int8"),
}
SMALL = "int6 up, int7 down"
METRICS = ("bertscore_f1", "rouge_l", "perplexity")
TARGET_PERCENT = 0.1

State = dict[str, Any]


@benchmark("traffic-quality", title="gate metrics over those of full precision, quickstart", minutes=25.0, cpu=False)
def traffic_quality(scale: Scale) -> Plan:
    """One arm, since the round and what its answers score in full precision are made once for all codecs."""
    turns = 2 if scale.quick else 6

    def conclude(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
        found = []
        for name in PAIRS if "rounded" in samples else ():
            figures = {
                key: [one.figures[f"{name}: {key}"] for one in samples["rounded"]] for key in ("error", "differ")
            }
            found.append(Finding(f"{name}, error of the joined adapter", mean(figures["error"]), "%"))
            found.append(Finding(f"{name}, answers that differ", mean(figures["differ"]), "%"))
            for metric in METRICS:
                changes = [one.figures[f"{name}: {metric}"] for one in samples["rounded"]]
                middle, error = mean(changes), stdev(changes) / len(changes) ** 0.5
                target = TARGET_PERCENT if name == SMALL else None
                found.append(Finding(f"{name}, {metric}, mean change", middle, "%"))
                most = abs(middle) + 2 * error
                found.append(Finding(f"{name}, {metric}, change is at most", most, "%", at_most=target))
        return found

    return Plan(
        arms=[Arm("rounded", rounded, {"rows": 8 if scale.quick else 400}, limit_seconds=7200.0)],
        turns=turns,
        conclude=conclude,
        notes=[f"Mean over {turns} sets of coins; 'at most' is its size and two of its standard errors."],
    )


def rounded(rows: int) -> Turn:
    """Trains and evaluates in full precision; a turn evaluates every codec under its own coins."""
    import torch

    from fedmentor_core.adapters.lora import load_state
    from fedmentor_core.evaluation.generate import generate
    from fedmentor_core.evaluation.perplexity import log_losses, perplexity
    from fedmentor_core.wire.codecs import find_codec
    from fedmentor_core.wire.envelope import decoded, encoded
    from fedmentor_core.wire.update import decode_update, encode_update

    torch.set_num_threads(1)
    workspace, base, updates = private_round(rows)
    evaluation = workspace.config.evaluation
    sets = [workspace.evaluation_set(domain.name, "gate") for domain in workspace.config.domains]
    references = [str(row["response"]) for one in sets for row in one.rows]
    model, tokenizer = workspace.new_adapter_model(), workspace.backbone.tokenizer
    model.eval()

    def joined(up: str, down: str, seed: int) -> State:
        """The global adapter after the round, as everybody reads it."""
        codec = find_codec(up)
        read = [
            decode_update(encode_update(one, codec, base, {}, 1000 * seed + place), codec, base)
            for place, one in enumerate(updates)
        ]
        joint = {name: sum(one[name].double() for one in read).div(len(read)).float() for name in updates[0]}
        return decoded(encoded(joint, find_codec(down), seed=1000 * seed + 999, metadata={}))

    def evaluated(adapter: State) -> tuple[list[str], dict[str, float]]:
        """Answers, and means over all rows; perplexity over all tokens."""
        load_state(model, adapter)
        texts: list[str] = []
        losses: list[float] = []
        n_tokens: list[int] = []
        size = evaluation.batch_size
        for one in sets:
            texts += generate(model, tokenizer, one.prompts, max_new_tokens=evaluation.max_new_tokens, batch_size=size)
            nats, counts = log_losses(model, tokenizer, one.targets, batch_size=size, device="cpu")
            losses, n_tokens = losses + nats, n_tokens + counts
        scores = workspace.scorers.utility.score(texts, references)
        return texts, {
            "bertscore_f1": mean(one.bertscore_f1 for one in scores),
            "rouge_l": mean(one.rouge_l for one in scores),
            "perplexity": perplexity(losses, n_tokens) or 0.0,
        }

    exact = joined("fp32", "fp32", 0)
    texts, metrics = evaluated(exact)
    turns = 0

    def turn() -> Sample:
        nonlocal turns
        turns += 1
        figures: dict[str, float] = {"answers": len(texts)}
        for name, (up, down) in PAIRS.items():
            adapter = joined(up, down, turns)
            found, scored = evaluated(adapter)
            differ = sum(one != other for one, other in zip(found, texts, strict=True))
            figures[f"{name}: error"] = 100 * _error(adapter, exact)
            figures[f"{name}: differ"] = 100 * differ / len(texts)
            figures |= {f"{name}: {one}": 100 * (scored[one] / metrics[one] - 1) for one in METRICS}
        return Sample(figures=figures)

    return turn


def private_round(rows: int) -> tuple[Any, Any, list[State]]:
    """Workspace, global adapter and updates of the quickstart's first round, trained under seeded noise."""
    from fedmentor_core.client_round import run_client
    from fedmentor_core.config_io import load_config
    from fedmentor_core.rounds import RoundState, assignments_for
    from fedmentor_core.study_ref import open_study
    from fedmentor_core.wire.update import Base
    from fedmentor_core.workspace import workspace_of

    changes = [
        "wire.upload=fp32",
        "wire.download=fp32",
        "privacy.noise_seed=1",
        "tracking.enabled=false",
        f"evaluation.max_gate_examples={rows}",
    ]
    with tempfile.TemporaryDirectory(prefix="fedmentor-bench-") as folder:
        workspace = workspace_of(open_study(load_config(QUICKSTART, changes), Path(folder, "study")))
        start = RoundState.first(workspace)
        base = Base(start.adapter.sha256, workspace.get_adapter(start.adapter))
        sent = [run_client(workspace, assignment).update for assignment in assignments_for(workspace, start)]
        return workspace, base, [workspace.get_update(one) for one in sent if one is not None]


def _error(found: State, meant: State) -> float:
    """L2 distance over L2 size."""
    missed = sum(float((found[name] - tensor).double().square().sum()) for name, tensor in meant.items())
    return float((missed / sum(float(tensor.double().square().sum()) for tensor in meant.values())) ** 0.5)
