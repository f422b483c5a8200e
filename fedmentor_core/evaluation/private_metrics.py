"""Metrics of a private set: row scores to one bounded vector per privacy unit, and released means to metrics.

Nothing here adds noise or decides whether it may be published: ``privacy/release.py`` stands between the two.

Besides four scores each row falls into exactly one cell of a table, (its label, what the output answers), where an
empty output is an answer of its own. One table holds all that label F1 and the empty rate need, and it adds 2 to the
squared sensitivity where a table of labels and a rate of empties would add 3.
"""

from collections.abc import Iterable, Sequence

from fedmentor_core.evaluation.labels import YES_NO
from fedmentor_core.evaluation.scores import RowScores
from fedmentor_core.privacy.release import ReleasedMeans, UnitScores
from fedmentor_core.records import Metrics

N_SCORES = 4
_OTHER, _EMPTY = "\x00other", "\x00empty"
"""Answers that are no label; no label can have these names, since a label has no control characters."""


def cells(labels: Sequence[str] = YES_NO) -> tuple[tuple[str, str], ...]:
    """The table's cells: (label or none, answer). How many there are does not matter to the sensitivity."""
    return tuple((label, answer) for label in (*labels, "") for answer in (*labels, _OTHER, _EMPTY))


def unit_scores(
    scored: Sequence[RowScores], unit_of_row: Sequence[str], labels: Sequence[str] = YES_NO
) -> list[UnitScores]:
    """One vector per unit: the mean of its rows' vectors.

    Args:
        scored: scored rows.
        unit_of_row: the unit each of them belongs to.
        labels: the domain's closed set of labels.
    """
    rows_by_unit: dict[str, list[RowScores]] = {}
    for one, unit in zip(scored, unit_of_row, strict=True):
        rows_by_unit.setdefault(unit, []).append(one)
    places = cells(labels)
    return [_mean(rows, places) for rows in rows_by_unit.values()]


def _mean(rows: Sequence[RowScores], places: Sequence[tuple[str, str]]) -> UnitScores:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(rows)

    found = [(one.label, _answer(one)) for one in rows]
    return UnitScores(
        scores=(
            mean(_bounded(one.bertscore_f1) for one in rows),
            mean(_bounded(one.rouge_l) for one in rows),
            mean(float(one.safe) for one in rows),
            mean(_bounded(one.toxicity) for one in rows),
        ),
        shares=tuple(found.count(place) / len(rows) for place in places),
    )


def _bounded(value: float) -> float:
    """Clipped row by row, so that no row outweighs the others of its unit; NaN becomes 0."""
    return min(1.0, max(0.0, value))


def _answer(one: RowScores) -> str:
    return one.answer or (_OTHER if one.output else _EMPTY)


def metrics_of_means(means: ReleasedMeans, n_units: int, labels: Sequence[str] = YES_NO) -> Metrics:
    """Everything that is published of a private set, from the noised vector and the public number of units.

    The mean is over units. ``toxicity_max`` is withheld: one row decides it. ``n_examples`` counts units, since how
    many rows they have is private.
    """
    bertscore_f1, rouge_l, safe_rate, toxicity_mean = means.scores
    table = dict(zip(cells(labels), means.shares, strict=True))
    return Metrics(
        bertscore_f1=bertscore_f1,
        rouge_l=rouge_l,
        label_f1=_label_f1(table, means.std, labels),
        safe_rate=safe_rate,
        toxicity_mean=toxicity_mean,
        toxicity_max=None,
        empty_rate=sum(share for (_, answer), share in table.items() if answer == _EMPTY),
        n_examples=n_units,
    )


def _label_f1(table: dict[tuple[str, str], float], std: float, labels: Sequence[str]) -> float:
    """``labels.label_f1`` from shares: macro F1 over the labels that occur among labelled rows.

    A label whose share the noise alone would explain does not occur: its F1 would be one of noise, and a part of the
    mean. With K labels a share is summed from 2 K + 2 cells, none below 0, so what noise leaves in it grows with K.
    """
    scores = []
    noise = std * (len(labels) + 1) / (len(YES_NO) + 1)
    for label in labels:
        in_gold = sum(table[label, answer] for answer in (*labels, _OTHER, _EMPTY))
        in_answers = sum(table[gold, label] for gold in labels)
        if in_gold + in_answers > noise:
            scores.append(2 * table[label, label] / (in_gold + in_answers))
    return sum(scores) / len(scores) if scores else 0.0
