"""``fedmentor generate``: ask a registered model."""

import json
import sys
from pathlib import Path
from typing import TextIO

from fedmentor_core.errors import ConfigError
from fedmentor_core.records import Record


class Answers(Record):
    """``fedmentor generate --json``."""

    schema_version: int = 1
    model: str
    version: str
    answers: tuple[str, ...]


def generate_command(
    model: str,
    tracking_uri: str,
    *,
    post: str | None = None,
    question: str | None = None,
    input_file: Path | None = None,
    max_new_tokens: int | None = None,
    backbone: str | None = None,
    device: str | None = None,
    as_json: bool = False,
    stream: TextIO | None = None,
) -> Answers:
    """Answer one question, or every line of a JSONL file, and print the answers.

    Args:
        model: ``models:/NAME@champion``, another alias, or ``models:/NAME/VERSION``.
        tracking_uri: MLflow's.
        post: the text to ask about; with ``question``.
        question: what to ask.
        input_file: JSONL with ``post`` and ``question``, or ``prompt``, on each line; instead of ``post``.
        max_new_tokens: longest answer; default: the study's.
        backbone: where the backbone is now, when it moved; its sha256 is still checked.
        device: 'auto', 'cpu' or 'cuda'.
        as_json: print one JSON object rather than text.
        stream: where to print; default: standard output.

    Returns:
        What was printed.

    Raises:
        ConfigError: nothing to ask, a malformed file, or no such model.
        BackboneError: the backbone is not the one the adapter was trained on.
    """
    rows = _rows(post, question, input_file)
    from tasks.registered_files import load_registered

    loaded = load_registered(tracking_uri, model, backbone=backbone, device=device)
    answers = Answers(model=loaded.name, version=loaded.version, answers=tuple(loaded.answers(rows, max_new_tokens)))
    stream = stream or sys.stdout
    if as_json:
        print(answers.model_dump_json(indent=2), file=stream)
    elif input_file is None:
        print(answers.answers[0] or "(empty answer)", file=stream)
    else:
        for number, answer in enumerate(answers.answers, start=1):
            print(f"{number}\t{' '.join(answer.split()) or '(empty answer)'}", file=stream)
    return answers


def _rows(post: str | None, question: str | None, input_file: Path | None) -> list[dict[str, str]]:
    if input_file is None:
        if post is None or question is None:
            raise ConfigError("give --post and --question together, or --input FILE.jsonl.")
        if not post.strip() or not question.strip():
            raise ConfigError("--post and --question must not be empty.")
        return [{"post": post, "question": question}]
    if post is not None or question is not None:
        raise ConfigError("give either --input or --post with --question, not both.")
    return read_questions(input_file)


def read_questions(path: Path) -> list[dict[str, str]]:
    """Read a JSONL file of questions; messages name lines, never their text.

    Raises:
        ConfigError: missing, not UTF-8, empty, or a line that is not a question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--input {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input {path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    rows = [_row(line, f"--input {path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ConfigError(f"--input {path} holds no line. Give JSON objects with 'post' and 'question'.")
    return rows


def _row(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON at column {error.colno}.") from None
    wanted = ("prompt",) if isinstance(row, dict) and "prompt" in row else ("post", "question")
    bad = [name for name in wanted if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if bad:
        raise ConfigError(f"{where}: needs 'post' and 'question', or 'prompt', as text; missing: {', '.join(bad)}.")
    return {name: row[name] for name in wanted}
