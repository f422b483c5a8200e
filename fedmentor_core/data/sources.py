"""Where a domain's rows come from: the ``source`` of a domain and the ``data`` section of a study.

Only pydantic and the pure rules of labels are imported here, so that reading a configuration stays fast. The
readers are in ``corpora.py`` (Dreaddit, IRF, MultiWD), ``mapping.py`` (CSV, JSONL, hub) and ``invented.py``;
``loading.py`` puts them together.
"""

from typing import Annotated, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmentor_core.evaluation.labels import YES_NO, YES_NO_FORM, AnswerForm, same_words

CorpusName = Literal["dreaddit", "irf", "multiwd"]
CorpusForm = Literal["raw", "instruction", "completion"]
LABEL_PLACE = "{label}"
"""Where an answer template holds the label."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnMapping(_Frozen):
    """Which column of a table holds what.

    Two shapes are allowed: a table that has the answers (``post``, ``response``) or a table that has labels
    (``post``, ``label``), from which the answer is built as "<label sentence>" or
    "<label sentence> Reasoning: <reasoning>". A table with both keeps its answers and takes ``label`` as the
    label that answers are scored against.

    Labels are yes and no, or with ``labels`` any closed set, such as nine causes: then ``answer`` is the label
    sentence, and what stands before its ``{label}`` is where the label of every answer is looked for.
    """

    post: str = Field(min_length=1, description="Column with the text the question is about.")
    response: str | None = Field(default=None, min_length=1, description="Column with the reference answer.")
    label: str | None = Field(
        default=None, min_length=1, description="Column with the label; its values are listed below."
    )
    question: str | None = Field(default=None, min_length=1, description="Column with the question of each row.")
    question_text: str | None = Field(
        default=None, min_length=1, description="One question for every row, instead of a question column."
    )
    reasoning: str | None = Field(
        default=None, min_length=1, description="Column with the explanation behind the label (may be empty)."
    )
    unit: str | None = Field(
        default=None,
        min_length=1,
        description="Column that names the privacy unit, such as a patient id. Without it: the post.",
    )
    yes_values: tuple[str, ...] = Field(
        default=("1", "yes", "true"),
        min_length=1,
        description="Label values that mean yes (case is ignored).",
    )
    no_values: tuple[str, ...] = Field(
        default=("0", "no", "false"), min_length=1, description="Label values that mean no (case is ignored)."
    )
    yes_sentence: str = Field(default="Yes.", min_length=2, description="Answer built for a yes label.")
    no_sentence: str = Field(default="No.", min_length=2, description="Answer built for a no label.")
    labels: tuple[str, ...] | None = Field(
        default=None,
        min_length=2,
        max_length=100,
        description="All labels there are, instead of yes and no, such as [school, family, work].",
    )
    label_values: dict[str, str] = Field(
        default={},
        description="Other values of the label column and the label each means, such as {'1': school}. The labels "
        "themselves need no line; case is ignored.",
    )
    answer: str = Field(
        default="{label}.",
        description="With labels: the answer built from a label, such as 'The cause is {label}.'",
    )
    label_is_gold: bool = Field(
        default=True, description="Whether people gave the labels (true) or a model did (false)."
    )

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.response is None and self.label is None:
            raise ValueError("columns: got neither response nor label; name at least one of the two columns")
        if (self.question is None) == (self.question_text is None):
            raise ValueError(
                "columns: name exactly one of question (a column) and question_text (one question for all rows)"
            )
        if self.reasoning is not None and self.response is not None:
            raise ValueError("columns: reasoning builds an answer from a label; remove it where response is set")
        yes = {value.strip().casefold() for value in self.yes_values}
        if yes & {value.strip().casefold() for value in self.no_values}:
            raise ValueError("columns: a value is in both yes_values and no_values; keep it in one of them")
        _check_labels(self)
        return self

    @property
    def answer_form(self) -> AnswerForm:
        """How answers of this table say their label."""
        if self.labels is None:
            return YES_NO_FORM
        return AnswerForm(self.labels, self.answer.partition(LABEL_PLACE)[0].strip())

    def label_of_value(self) -> dict[str, str]:
        """Label by value of the label column, case folded."""
        if self.labels is None:
            known = dict.fromkeys(self.yes_values, "yes") | dict.fromkeys(self.no_values, "no")
        else:
            known = {label: label for label in self.labels} | self.label_values
        return {value.strip().casefold(): label for value, label in known.items()}

    def answer_of(self, label: str) -> str:
        """The label sentence built from a label."""
        if self.labels is None:
            return self.yes_sentence if label == YES_NO[0] else self.no_sentence
        return self.answer.replace(LABEL_PLACE, label)


def _check_labels(columns: ColumnMapping) -> None:
    """Refuse a closed set that cannot be read back from its own answers.

    Raises:
        ValueError: settings of both kinds of label, labels that look alike, or an answer that hides its label.
    """
    fields = ColumnMapping.model_fields.items()  # a stored configuration names every field: what differs was given
    given = {name for name, field in fields if getattr(columns, name) != field.default}
    if columns.labels is None:
        if extra := sorted({"label_values", "answer"} & given):
            raise ValueError(f"columns: {' and '.join(extra)} need 'labels', the closed set of labels")
        return
    if extra := sorted({"yes_values", "no_values", "yes_sentence", "no_sentence"} & given):
        raise ValueError(
            f"columns: got labels and {', '.join(extra)}; labels stand in the place of yes and no: keep one"
        )
    for k, label in enumerate(columns.labels):
        if same_words(label, "") or not label.isprintable():
            raise ValueError(f"columns.labels: got {label!r}; allowed: one line with at least one letter or digit")
        if any(same_words(label, other) for other in columns.labels[:k]):
            raise ValueError(f"columns.labels: got {label!r} twice (case and punctuation are ignored); keep one")
    meaning = {label.strip().casefold(): label for label in columns.labels}
    for value, label in columns.label_values.items():
        if label not in columns.labels:
            raise ValueError(
                f"columns.label_values: {value!r} means {label!r}, which is no label. Allowed: "
                f"{', '.join(columns.labels)}"
            )
        if meaning.setdefault(value.strip().casefold(), label) != label:
            raise ValueError(f"columns.label_values: {value!r} means two labels; keep one of them")
    if columns.answer.count(LABEL_PLACE) != 1:
        raise ValueError(f"columns.answer: got {columns.answer!r}; allowed: a text with {LABEL_PLACE} in it once")
    form = columns.answer_form
    for label in columns.labels:
        answer = columns.answer_of(label)
        if (read := form.parse(answer)) != label:
            said = "no label" if read is None else repr(read)
            raise ValueError(
                f"columns.answer: for {label!r} it gives {answer!r}, which reads as {said}; put punctuation or another "
                f"word around {LABEL_PLACE}"
            )


class InventedSource(_Frozen):
    """Invented posts from the built-in generator: nobody's data, for the quickstart and for tests."""

    kind: Literal["invented"] = "invented"
    corpus: str = Field(min_length=1, description="Name of the invented corpus.")
    n_units: int = Field(ge=3, le=1_000_000, description="Number of privacy units to generate.")
    seed: int = Field(default=0, ge=0, description="Seed of the generator.")


class CorpusSource(_Frozen):
    """One of the three public corpora, read from ``data.root``."""

    kind: CorpusName = Field(description="Which corpus.")
    form: CorpusForm = Field(
        default="raw",
        description="raw: human labels, answers built from them; instruction and completion: the IMHI "
        "release, whose answers were written by ChatGPT.",
    )
    files: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Files relative to data.root; by default every file of this corpus and form.",
    )
    human_labels: bool | None = Field(
        default=None,
        description="For the IMHI forms: take human labels (and Dreaddit's post ids) from the raw files "
        "where the text matches. Default: true for dreaddit, whose texts need the post ids to be grouped into "
        "privacy units, and false for the others, whose IMHI answers contradict a fifth of the human labels.",
    )

    @model_validator(mode="after")
    def _check_human_labels(self) -> Self:
        if self.form == "raw" and self.human_labels is False:
            raise ValueError("human_labels: got false with form raw, whose labels are human; remove the setting")
        return self


class TableSource(_Frozen):
    """A CSV or JSONL file with its column mapping."""

    kind: Literal["csv", "jsonl"] = Field(description="File format; UTF-8, CSV with a header row.")
    path: str = Field(min_length=1, description="The file; a relative path starts at data.root where that is set.")
    columns: ColumnMapping = Field(description="Which column holds what.")


class HubSource(_Frozen):
    """A dataset of the Hugging Face hub (or a local folder that ``datasets`` can load)."""

    kind: Literal["hub"] = "hub"
    name: str = Field(min_length=1, description="Dataset name, owner/name, or a local folder.")
    config: str | None = Field(default=None, description="Configuration name of the dataset.")
    split: str = Field(default="train", min_length=1, description="Which of the dataset's splits to read.")
    revision: str | None = Field(
        default=None, description="Commit, tag or branch. Pin a commit so that a study can be repeated."
    )
    columns: ColumnMapping = Field(description="Which column holds what.")


class SiteSource(_Frozen):
    """Rows that are at the domain's site: where, only the site's own file says (``fedmentor_core/site/file.py``)."""

    kind: Literal["site"] = "site"


def answer_form_of(source: InventedSource | CorpusSource | TableSource | HubSource | SiteSource) -> AnswerForm:
    """How a domain's answers say their label: yes or no, unless its columns say otherwise."""
    return source.columns.answer_form if isinstance(source, TableSource | HubSource) else YES_NO_FORM


LocalSource = Annotated[
    InventedSource | CorpusSource | TableSource | HubSource,
    Field(discriminator="kind", description="Where the rows come from."),
]
Source = Annotated[
    InventedSource | CorpusSource | TableSource | HubSource | SiteSource,
    Field(discriminator="kind", description="Where the rows come from."),
]


class DataConfig(_Frozen):
    """How rows of every domain are found, grouped into privacy units and split."""

    root: str | None = Field(default=None, description="Folder that holds the corpora.")
    split_seed: int = Field(default=0, ge=0, description="Seed of the split. Every site of a study must use the same.")
    gate_fraction: float = Field(
        default=0.15,
        ge=0.0,
        lt=1.0,
        description="Share of the posts in the gate set, which steers the study.",
    )
    test_fraction: float = Field(
        default=0.2,
        ge=0.0,
        lt=1.0,
        description="Share of the posts in the test set, which no decision looks at.",
    )
    max_units: int | None = Field(
        default=None,
        ge=3,
        description="Most privacy units to use per domain, over all splits; chosen by digest.",
    )
    digest_key_variable: str = Field(
        default="FEDMENTOR_UNIT_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable with the secret that unit digests are keyed with. Unset: a public "
        "key, with which whoever holds a post can recognise its digest; set it before digests leave a site.",
    )

    @model_validator(mode="after")
    def _check_fractions(self) -> Self:
        if self.gate_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"gate_fraction + test_fraction: got {self.gate_fraction + self.test_fraction:g}; allowed: "
                "below 1, so that posts are left to train on"
            )
        return self


class DomainSpec(Protocol):
    """What the loader needs to know of a domain."""

    @property
    def name(self) -> str:
        """Name of the domain, unique in the study."""
        ...

    @property
    def source(self) -> InventedSource | CorpusSource | TableSource | HubSource | SiteSource:
        """Where its rows come from."""
        ...
