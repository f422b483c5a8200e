"""A study on text with planted secrets, by the real command line, in which everything that can fail fails once.

A program of its own, so that a test can capture every byte that its process prints:

    python leaky_study.py FOLDER BACKBONE

``FOLDER/data`` is the sites' own; ``FOLDER/left`` is what left; ``FOLDER/truth.json`` says what must not be there.
"""

import csv
import json
import logging
import os
import secrets
import string
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BACKBONE = sys.argv[2] if len(sys.argv) > 2 else ""
ROOMS = ("kitchen", "office", "garden", "station", "library", "bakery", "workshop", "harbour")
N_UNITS = 44


def token(length: int = 14) -> str:
    """Random letters: they survive the escapes of JSON, URLs and HTML, so that those need no search of their own."""
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(length))


def rows_of(domain: str) -> list[dict[str, str]]:
    """Invented rows; every cell but the label holds a secret of its own."""
    rows = []
    for unit in range(N_UNITS):
        patient = f"patient-{token()}"
        for _ in range(1 + unit % 2):
            yes = secrets.randbelow(2)
            rows.append(
                {
                    "patient": patient,
                    "post": f'{token()} é "{domain}" I sat in the {secrets.choice(ROOMS)} all night.',
                    "question": f"Does the writer of {token()} sleep?",
                    "answer": f"{'Yes' if yes else 'No'}. Reasoning: {token()}",
                    "label": str(yes),
                }
            )
    return rows


class Failures:
    """Errors that quote private text; each is raised once, in order, when its place is reached."""

    def __init__(self, quotes: Sequence[str]) -> None:
        """``quotes``: private texts for failures at places that hold none themselves."""
        self.quotes = quotes
        self.pending: list[tuple[str, Callable[[str], BaseException]]] = []
        self.raised: list[str] = []

    def reach(self, place: str, text: str) -> None:
        """Raise what waits for ``place``, if it is next."""
        if self.pending and self.pending[0][0] == place:
            _, make = self.pending.pop(0)
            error = make(text)
            self.raised.append(f"{place}: {type(error).__name__}")
            raise error


def chained(kind: Callable[[str], BaseException], message: Callable[[str], str]) -> Callable[[str], BaseException]:
    """An error that carries the text in a cause, in that one's context, and in notes."""

    def make(text: str) -> BaseException:
        try:
            try:
                raise KeyError(text)
            except KeyError:
                raise ValueError(f"cannot encode {text!r}")  # noqa: B904 - the context is the point
        except ValueError as inner:
            error = kind(message(text))
            error.__cause__ = inner
            error.add_note(f"while at {text}")
            return error

    return make


def ours(_: str) -> str:
    return "our own message, which quotes nothing"


def quoting(text: str) -> str:
    return f"bad input: {text}"


def main() -> None:
    folder, backbone = Path(sys.argv[1]), BACKBONE
    left = folder / "left"
    left.mkdir()
    os.environ["PREFECT_HOME"] = str(left / "prefect")
    os.environ["COLUMNS"] = "400"  # nothing is wrapped in the middle of a secret
    data = write_data(folder / "data")
    truth: dict[str, Any] = {"units": sorted({row["patient"] for rows in data.values() for row in rows})}

    failures = Failures(truth["units"])
    numbers = record_numbers(failures)
    inject(failures)
    codes: dict[str, int] = {}

    config = write_config(folder, backbone, "public")
    run = ("run", "-c", config, "-o", left / "public", "--plain")
    train_failures(failures)
    failures.pending.append(("aggregate", chained(ValueError, quoting)))
    codes["aggregation fails"] = call(*run)
    failures.pending.append(("evaluate", chained(ValueError, quoting)))
    codes["evaluation fails"] = call(*run)
    failures.pending.extend([("forward", chained(backbone_error, ours))])  # never retried: fails for good
    codes["one client fails for good"] = call(*run)
    for command in ("plan", "ledger"):
        arguments = ("-c", config) if command == "plan" else ()
        for form in ((), ("--json",)):
            codes[f"{command} {form}"] = call(command, *arguments, "-o", left / "public", *form)
    codes["report"] = call("report", left / "public")
    truth["public"] = truth_of(left / "public", config)
    truth["losses"], truth["norms"] = map(list, numbers)

    scores = record_scores()
    codes["private gate"] = call(
        "run", "-c", write_config(folder, backbone, "private"), "-o", left / "private", "--json"
    )
    truth["private"] = truth_of(left / "private", folder / "private.yaml")
    truth["private_scores"] = scores

    codes |= broken_data(folder, left, backbone, failures, data)
    truth["codes"], truth["raised"], truth["waiting"] = codes, failures.raised, len(failures.pending)
    (folder / "truth.json").write_text(json.dumps(truth))


def backbone_error(message: str) -> BaseException:
    from fedmentor_core.errors import BackboneError

    return BackboneError(message)


def storage_error(message: str) -> BaseException:
    from fedmentor_core.errors import StorageError

    return StorageError(message)


def train_failures(failures: Failures) -> None:
    failures.pending = [
        ("encode", chained(ValueError, quoting)),
        ("forward", chained(storage_error, ours)),
        ("forward", lambda _: KeyError(failures.quotes[0])),
        ("talk", lambda _: RuntimeError(failures.quotes[1])),
    ]


def called_by(function: str) -> bool:
    """Whether a function of this name is on the stack."""
    return any(frame.name == function for frame in traceback.extract_stack())


def inject(failures: Failures) -> None:
    """Put the failures where a library would fail on data, and let libraries talk about it."""
    from fedmentor_core.data import encode
    from fedmentor_core.evaluation import scores
    from fedmentor_core.rounds import joining
    from fedmentor_core.training import client

    tokenize, train, generate, arriving = encode._tokenize, client.losses_of, scores.generate, joining.arriving

    def failing_tokenize(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
        if texts and "Reasoning" in texts[0] and not called_by("evaluation_set"):
            failures.reach("encode", texts[0])
        return tokenize(tokenizer, texts, **options)

    def failing_losses(model: Any, input_ids: Any, *rest: Any, **options: Any) -> Any:
        text = the_tokenizer().decode(input_ids[0])
        for name in ("transformers.tokenization_utils_base", "opacus", "a.library", "asyncio"):
            logging.getLogger(name).error("sequence too long: %s", text)
        logging.error("root logger: %s", text)
        warnings.warn(f"strange characters in {text}", UserWarning, stacklevel=1)
        try:
            raise ValueError(text)
        except ValueError:
            logging.getLogger("a.library").exception("could not handle %s", text)
        failures.reach("forward", text)
        failures.reach("talk", text)
        return train(model, input_ids, *rest, **options)

    def failing_generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **options: Any) -> Any:
        failures.reach("evaluate", tokenizer.decode(prompts[0]))
        return generate(model, tokenizer, prompts, **options)

    def failing_arriving(*arguments: Any) -> Any:
        failures.reach("aggregate", failures.quotes[2])
        return arriving(*arguments)

    encode._tokenize, client.losses_of = failing_tokenize, failing_losses
    scores.generate, joining.arriving = failing_generate, failing_arriving


def record_numbers(failures: Failures) -> tuple[list[list[float]], list[list[float]]]:
    """Each unit's losses and gradient norms, as they really are in the run."""
    import torch
    from opacus.optimizers import DPOptimizer

    from fedmentor_core.training import client

    losses: list[list[float]] = []
    norms: list[list[float]] = []
    losses_of, clip = client.losses_of, DPOptimizer.clip_and_accumulate

    def recorded_losses(*arguments: Any, **options: Any) -> Any:
        found = losses_of(*arguments, **options)
        losses.append([float(value) for value in found if value != 0])
        return found

    def recorded_clip(self: Any) -> None:
        parts = [g.flatten(1).norm(dim=1) for g in self.grad_samples if len(g)]
        if parts:
            norms.append([float(value) for value in torch.stack(parts, dim=1).norm(dim=1)])
        clip(self)

    client.losses_of, DPOptimizer.clip_and_accumulate = recorded_losses, recorded_clip
    return losses, norms


def record_scores() -> list[list[float]]:
    """Every output's scores, from which the metrics of a private set are made."""
    from fedmentor_core.evaluation.toxicity import ToxicityScorer
    from fedmentor_core.evaluation.utility import UtilityScorer

    found: list[list[float]] = []
    toxicity, utility = ToxicityScorer.score, UtilityScorer.score

    def recorded_toxicity(self: Any, outputs: Sequence[str]) -> Any:
        values = toxicity(self, outputs)
        found.append([float(value) for value in values])
        return values

    def recorded_utility(self: Any, outputs: Sequence[str], references: Sequence[str]) -> Any:
        values = utility(self, outputs, references)
        found.append([value.bertscore_f1 for value in values])
        found.append([value.rouge_l for value in values])
        return values

    ToxicityScorer.score, UtilityScorer.score = recorded_toxicity, recorded_utility  # type: ignore[method-assign]
    return found


def the_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BACKBONE)


def truth_of(out: Path, config: Path) -> dict[str, Any]:
    """What the training and test rows of a study are, in text and in tokens."""
    from fedmentor_core.config_io import load_config
    from fedmentor_core.study_ref import find_study
    from fedmentor_core.workspace import workspace_of

    workspace = workspace_of(find_study(load_config(config), out))
    texts: dict[str, list[str]] = {"train": [], "gate": [], "test": []}
    tokens = []
    digests: list[str] = []
    for domain in workspace.config.domains:
        data = workspace.data[domain.name]
        for split, rows in data.splits().items():
            texts[split] += [" ".join((row["post"], row["question"], row["response"])) for row in rows]
        digests += data.unit_digests()
        tokens += [list(ids) for ids in workspace.training_set(domain.name).input_ids]
    return {"texts": texts, "tokens": tokens, "digests": sorted(set(digests))}


def broken_data(
    folder: Path, left: Path, backbone: str, failures: Failures, data: dict[str, list[dict[str, str]]]
) -> dict[str, int]:
    """Data that does not load, at the command line and, as a deployment would meet it, inside the flow."""
    rows = data["one"]
    path = folder / "data" / "one.csv"
    good = path.read_bytes()
    broken = {
        "no header": good.split(b"\n", 1)[1],
        "one field too many": good + f'{rows[0]["patient"]},"{rows[0]["post"]}",x,x,x,x\n'.encode(),
        "open quote": good + f'"{rows[0]["patient"]}\n'.encode(),
        "unknown label": good + f"{rows[0]['patient']},a post,a question,an answer,{rows[1]['patient']}\n".encode(),
        "not UTF-8": good + rows[0]["patient"].encode() + b"\xff\n",
    }
    codes = {}
    for name, content in broken.items():
        path.write_bytes(content)
        config = write_config(folder, backbone, "public", name=f"broken-{len(codes)}")
        codes[name] = call("run", "-c", config, "-o", left / config.stem, "--plain")
    path.write_bytes(broken["no header"])
    codes["no header, in the flow"] = flow_code(config, left / "broken-flow")
    path.write_bytes(good)

    from fedmentor_core.data import loading

    read = loading.read_table

    def failing_read(*arguments: Any) -> Any:
        failures.reach("read", failures.quotes[3])
        return read(*arguments)

    loading.read_table = failing_read
    failures.pending = [("read", chained(ValueError, quoting)), ("read", chained(ValueError, quoting))]
    config = write_config(folder, backbone, "public", name="unreadable")
    codes["reader fails"] = call("run", "-c", config, "-o", left / "unreadable", "--plain")
    codes["reader fails, in the flow"] = flow_code(config, left / "unreadable-flow")
    return codes


def flow_code(config: Path, out: Path) -> int:
    """Run the flow without the command line; 1 when it failed."""
    from fedmentor_core.config_io import load_config
    from flows.federated_training import federated_training

    try:
        federated_training(load_config(config), str(out))
    except Exception as error:
        traceback.print_exception(error)  # what the process of a deployed flow prints
        return 1
    return 0


def call(*arguments: object) -> int:
    """The command line in this process: libraries stay loaded, and one Prefect server serves all calls."""
    from flows import cli

    sys.argv = ["fedmentor", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except Exception as error:
        traceback.print_exception(error)  # what the interpreter would print
        return 1
    return 0


def write_data(folder: Path) -> dict[str, list[dict[str, str]]]:
    folder.mkdir()
    data = {name: rows_of(name) for name in ("one", "two")}
    with (folder / "one.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(data["one"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(data["one"])
    lines = [json.dumps(row, ensure_ascii=False) for row in data["two"]]
    (folder / "two.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data


def write_config(folder: Path, backbone: str, gate_data: str, name: str | None = None) -> Path:
    import yaml

    columns = {"post": "post", "question": "question", "response": "answer", "label": "label", "unit": "patient"}
    config = {
        "name": name or gate_data,
        "rounds": 2 if gate_data == "public" else 1,
        "backbone": {"name": backbone, "max_length": 192},
        "adapter": {"rank": 2, "alpha": 4.0},
        "data": {"root": str(folder / "data"), "test_fraction": 0.15},
        "domains": [
            {"name": "one", "source": {"kind": "csv", "path": "one.csv", "columns": columns}, "epsilon": 8.0},
            {"name": "two", "source": {"kind": "jsonl", "path": "two.jsonl", "columns": columns}, "epsilon": 8.0},
        ],
        "training": {"steps_per_round": 2, "batch_size": 4, "microbatch_size": 4, "max_target_tokens": 48},
        "privacy": {"reserve_fraction": 0.8},  # four failed attempts are paid from it
        "evaluation": {
            "gate_data": gate_data,
            "max_gate_examples": 4,
            "max_test_examples": 4,
            "max_new_tokens": 8,
            "samples_in_report": 2,
            "thresholds": [{"metric": "toxicity_mean", "at_most": 1.0}],
        },
        "execution": {"client_retries": 4, "torch_threads": 1},
        "tracking": {"enabled": name is None},  # a new database takes seconds
    }
    path = folder / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
