"""Any table by column mapping: CSV, JSONL, or a dataset that ``datasets`` can load."""

from collections.abc import Sequence

from fedmentor_core.data.files import Record, as_records, read_csv, read_jsonl, require_columns, resolve
from fedmentor_core.data.records import Counter, Row
from fedmentor_core.data.sources import ColumnMapping, HubSource, TableSource
from fedmentor_core.errors import DataError


def read_table(source: TableSource, root: str | None, counter: Counter) -> list[Row]:
    """Rows of a CSV or JSONL file.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or broken, or does not fit the mapping.
    """
    path = resolve(root, source.path)
    columns, records = read_csv(path) if source.kind == "csv" else read_jsonl(path)
    return map_rows(str(path), columns, records, source.columns, counter)


def read_hub(source: HubSource, counter: Counter) -> list[Row]:
    """Rows of a hub dataset, or of a local folder that ``datasets`` can load.

    Raises:
        DataError: the dataset cannot be loaded, is empty, or does not fit the mapping.
    """
    import datasets

    where = f"hub dataset {source.name!r} (split {source.split!r})"
    try:
        table = datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises many kinds, and some of them quote rows
        raise DataError(
            f"{where}: cannot be loaded ({type(error).__name__}). Allowed: a dataset that this machine can "
            "reach or has cached, with that configuration, split and revision. Check the name and the "
            "network, or save the rows as CSV or JSONL and use that source."
        ) from None
    columns, records = as_records(table.to_list())
    if not records:
        raise DataError(f"{where}: got no rows; allowed: at least one.")
    return map_rows(where, columns, records, source.columns, counter)


def map_rows(
    where: str, columns: Sequence[str], records: Sequence[Record], mapping: ColumnMapping, counter: Counter
) -> list[Row]:
    """Build rows from records by a column mapping.

    Raises:
        DataError: a mapped column does not exist, a label value is not listed, or a unit id is empty.
    """
    names = ("post", "response", "label", "question", "reasoning", "unit")
    require_columns(where, columns, {f"columns.{name}": getattr(mapping, name) for name in names})
    labels, form = mapping.label_of_value(), mapping.answer_form
    rows = []
    for number, record in enumerate(records, start=1):
        label = ""
        if mapping.label is not None:
            label = _label(where, number, mapping, record[mapping.label], labels)
        unit = record[mapping.unit].strip() if mapping.unit else None
        if unit == "":
            raise DataError(
                f"{where}: row {number} has an empty value in the unit column {mapping.unit!r}. Allowed: an "
                "id in every row, because privacy is accounted by unit. Fill the ids, or drop the row."
            )
        reasoning = record[mapping.reasoning] if mapping.reasoning else ""
        question = record[mapping.question] if mapping.question else mapping.question_text or ""
        response = record[mapping.response] if mapping.response else ""
        texts = (record[mapping.post], question, response, reasoning)
        post, question, response, reasoning = counter.repair(*texts)
        if mapping.response is None and label:
            response = mapping.answer_of(label)
            response += f" Reasoning: {reasoning}" if reasoning else ""
        gold = bool(label) and mapping.label_is_gold
        word = form.parse(response) or ""
        if gold and word and word != label:
            counter.add("answer_against_label")
        rows.append(Row(post, question, response, label or word, gold, unit))
    return rows


def _label(where: str, number: int, mapping: ColumnMapping, value: str, labels: dict[str, str]) -> str:
    text = value.strip().casefold()
    if text in labels:
        return labels[text]
    if not text:
        return ""  # a row without a label and without an answer is dropped as empty
    if mapping.labels is None:
        allowed = f"{', '.join(mapping.yes_values)} (yes) and {', '.join(mapping.no_values)} (no)"
        place = "columns.yes_values or columns.no_values"
    else:
        allowed = ", ".join([*mapping.labels, *(f"{value} ({means})" for value, means in mapping.label_values.items())])
        place = "columns.labels or columns.label_values"
    raise DataError(
        f"{where}: row {number}, column {mapping.label!r}: a value of {len(value)} characters is not a "
        f"known label. Allowed: {allowed}. Add the value to {place}, or correct the row."
    )
