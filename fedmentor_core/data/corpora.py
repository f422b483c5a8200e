"""Dreaddit, IRF and MultiWD in their raw form and in the two IMHI forms (MentaLLaMA, arXiv 2309.13567).

Which labels are gold:

- ``raw``: the labels are human. The answer is the IMHI label sentence, and for IRF the span that the
  annotator marked stands as the reasoning. Dreaddit and MultiWD have no explanations: the label sentence is
  the answer.
- ``instruction``, ``completion``: the answers were written by ChatGPT, and so is the yes or no they open with
  (it contradicts 1 to 2 % of Dreaddit's human labels, 20 to 25 % of IRF's, up to 22 % of MultiWD's). Where
  the raw files are joined (``human_labels``), the human label is the row's label and is gold; the answer
  stays as it is.

The privacy unit is the post. Dreaddit's segments of one post share its ``post_id``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmentor_core.data.files import Record, read_csv, require_columns, resolve
from fedmentor_core.data.records import Counter, Row
from fedmentor_core.data.sources import CorpusForm, CorpusName, CorpusSource
from fedmentor_core.data.text import answer_word, letters_of, repair_mojibake, squeeze
from fedmentor_core.errors import DataError


@dataclass(frozen=True, slots=True)
class Task:
    """One yes/no question that a corpus asks about every post."""

    label_column: str
    question: str
    span_column: str | None = None


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a corpus asks, how its answers open, and where its files are below ``data.root``."""

    tasks: tuple[Task, ...]
    yes_sentence: str
    no_sentence: str
    files: dict[CorpusForm, tuple[str, ...]]
    unit_column: str | None = None


def _files(folder: str, raw: str, imhi: str) -> dict[CorpusForm, tuple[str, ...]]:
    return {
        "raw": tuple(f"{folder}/raw_{part}.csv" for part in raw.split()),
        "instruction": tuple(f"{folder}/imhi_instruction_{part}.csv" for part in imhi.split()),
        "completion": tuple(f"{folder}/imhi_completion_{part}.csv" for part in imhi.split()),
    }


_DIMENSIONS = ("Spiritual", "Physical", "Intellectual", "Social", "Vocational", "Emotional")

CORPORA: dict[CorpusName, Corpus] = {
    "dreaddit": Corpus(
        tasks=(Task("label", "Does the poster suffer from stress?"),),
        yes_sentence="Yes, the poster suffers from stress.",
        no_sentence="No, the poster does not suffer from stress.",
        files=_files("dreaddit", "train test", "train val test"),
        unit_column="post_id",
    ),
    "irf": Corpus(
        tasks=(
            Task("belong", "Does the post show risk of thwarted belongingness?", "belong_exp"),
            Task("burden", "Does the post show risk of perceived burdensomeness?", "burden_exp"),
        ),
        yes_sentence="Yes, the post shows this risk.",
        no_sentence="No, the post does not show this risk.",
        files=_files("irf", "train val test", "val test"),
    ),
    "multiwd": Corpus(
        tasks=tuple(
            Task(name, f"Does the {name.lower()} wellness dimension exist in the post?") for name in _DIMENSIONS
        ),
        yes_sentence="Yes, this wellness dimension exists in the post.",
        no_sentence="No, this wellness dimension does not exist in the post.",
        files=_files("multiwd", "train test", "val test"),
    ),
}
"""The three public corpora. The source publishes no IMHI train file of IRF and MultiWD here: raw has those
posts."""

# The last marker of a query separates post and question: a post may hold the word "Question:" itself.
_INSTRUCTION = re.compile(r'\s*Consider this post: "(?P<post>.*)" Question: (?P<question>.*)', re.DOTALL)
_COMPLETION_QUESTION = r'Question: The answer to the question:? "(?P<question>[^"]*\?)" is\s*'
_COMPLETION = re.compile(rf"\s*Post: (?P<post>.*?)\s*{_COMPLETION_QUESTION}", re.DOTALL)
_POST_PREFIX = "Post: "


def read_corpus(source: CorpusSource, root: str | None, counter: Counter) -> list[Row]:
    """Rows of a public corpus.

    Raises:
        ConfigError: ``data.root`` is not set or not a folder.
        DataError: a file is missing, empty, not UTF-8, or is not in the form that was asked for.
    """
    corpus = CORPORA[source.kind]
    paths = [resolve(root, name, need_root=True) for name in source.files or corpus.files[source.form]]
    if source.form == "raw":
        return [row for path in paths for row in _read_raw(path, corpus, counter)]
    rows = [row for path in paths for row in _read_imhi(path, source, corpus, counter)]
    if source.human_labels is False or (source.human_labels is None and source.kind != "dreaddit"):
        return rows
    try:
        raw_paths = [resolve(root, name, need_root=True) for name in corpus.files["raw"]]
    except DataError as error:
        raise DataError(
            f"{source.kind} in the {source.form} form takes human labels and post ids from its raw files, and: "
            f"{error} Or set human_labels to false: then no label is gold, and every text is a privacy unit of its "
            "own, also where several were cut from one post."
        ) from None
    return _join_human_labels(rows, [row for path in raw_paths for row in _read_raw(path, corpus, Counter())], counter)


def _read_raw(path: Path, corpus: Corpus, counter: Counter) -> Iterator[Row]:
    columns, records = read_csv(path)
    wanted: dict[str, str | None] = {"text": "text", "unit": corpus.unit_column}
    for task in corpus.tasks:
        wanted |= {task.label_column: task.label_column, f"{task.label_column} span": task.span_column}
    require_columns(f"{path} (form raw)", columns, wanted)
    for number, record in enumerate(records, start=1):
        unit = record[corpus.unit_column].strip() if corpus.unit_column else None
        if unit == "":
            raise DataError(f"{path}: row {number} has an empty {corpus.unit_column!r}. Allowed: an id in every row.")
        spans = [record[task.span_column] if task.span_column else "" for task in corpus.tasks]
        post, *spans = counter.repair(record["text"], *spans)
        for task, span in zip(corpus.tasks, spans, strict=True):
            label = _raw_label(path, number, task.label_column, record[task.label_column])
            response = corpus.yes_sentence if label == "yes" else corpus.no_sentence
            if label == "yes" and span:
                response += f' Reasoning: the post says "{squeeze(span)}".'
            yield Row(post, task.question, response, label, True, unit)


def _raw_label(path: Path, number: int, column: str, value: str) -> str:
    try:
        return {"0": "no", "1": "yes"}[value.strip()]
    except KeyError:
        raise DataError(
            f"{path}: row {number}, column {column!r}: a value of {len(value)} characters is not a known "
            "label. Allowed: 0 and 1. Fetch the file again with 'fedmentor data fetch', or correct the row."
        ) from None


def _read_imhi(path: Path, source: CorpusSource, corpus: Corpus, counter: Counter) -> Iterator[Row]:
    columns, records = read_csv(path)
    with_query = "query" in columns
    names = ("query", "gpt-3.5-turbo") if with_query else ("post", "question", "response")
    require_columns(f"{path} (form {source.form})", columns, {name: name for name in names})
    questions = {_normal_question(task.question): task.question for task in corpus.tasks}
    dropped = []
    for number, record in enumerate(records, start=1):
        parts = _split_query(record["query"], source.form) if with_query else _split_columns(record)
        question = questions.get(_normal_question(parts[1])) if parts else None
        if parts is None or question is None:
            counter.add("malformed_dropped")
            dropped.append(number)
            continue
        if "Question: " in parts[0]:
            counter.add("malformed")
        post, response = counter.repair(parts[0], record["gpt-3.5-turbo" if with_query else "response"])
        yield Row(post, question, response, answer_word(response), False)
    if len(dropped) > max(1, len(records) // 100):
        raise DataError(
            f"{path}: {len(dropped)} of {len(records)} rows (the first is row {dropped[0]}) do not follow "
            f"the {source.form} form of {source.kind}. Allowed: at most 1 % of the rows. Check kind, form "
            "and files."
        )


def _split_query(query: str, form: CorpusForm) -> tuple[str, str] | None:
    match = (_INSTRUCTION if form == "instruction" else _COMPLETION).fullmatch(query)
    return (match["post"], match["question"]) if match else None


def _split_columns(record: Record) -> tuple[str, str]:
    post = record["post"].strip().removeprefix(_POST_PREFIX)
    match = re.fullmatch(_COMPLETION_QUESTION, record["question"].strip())
    return post, match["question"] if match else record["question"]


def _normal_question(question: str) -> str:
    # The completion form asks "Does the poster suffers ..."; both forms become the instruction form's
    # question.
    text = squeeze(question).casefold()
    return text.replace("suffers ", "suffer ").replace("shows ", "show ").replace("exists ", "exist ")


def _join_human_labels(rows: list[Row], raw: list[Row], counter: Counter) -> list[Row]:
    """Give IMHI rows the label and unit of the raw row with the same letters and question."""
    known: dict[tuple[str, str], list[Row]] = {}
    for row in raw:
        known.setdefault((letters_of(row.post), row.question), []).append(row)
    joined = []
    for row in rows:
        text = repair_mojibake(row.post)[0]
        found = known.get((letters_of(text), row.question), [])
        unit = min((match.unit for match in found if match.unit), default=None)
        labels = {match.label for match in found}
        if len(labels) != 1:  # not in the raw files, or there with both labels
            counter.add("without_human_label")
            joined.append(Row(row.post, row.question, row.response, row.label, False, unit))
            continue
        label = labels.pop()
        if row.label and row.label != label:
            counter.add("answer_against_label")
        joined.append(Row(row.post, row.question, row.response, label, True, unit))
    return joined
