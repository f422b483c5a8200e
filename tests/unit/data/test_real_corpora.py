"""The real corpora, where they are at hand: counts, repairs, overlap and label agreement; no text."""

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedmentor_core.data.catalogue import catalogue
from fedmentor_core.data.corpora import CORPORA, read_corpus
from fedmentor_core.data.describe import describe
from fedmentor_core.data.loading import load_domain_data, load_study_data
from fedmentor_core.data.records import Counter
from fedmentor_core.data.sources import CorpusSource, DataConfig
from fedmentor_core.data.text import post_key, repair_mojibake

pytestmark = pytest.mark.data
NAMES = ("dreaddit", "irf", "multiwd")


@dataclass(frozen=True)
class Domain:
    name: str
    source: CorpusSource


@pytest.fixture(scope="module")
def root():
    named = os.environ.get("FEDMENTOR_DATA_ROOT")
    folder = Path(named) if named else Path(__file__).resolve().parents[3].parent / "shared" / "data"
    if named and not folder.is_dir():
        pytest.fail("FEDMENTOR_DATA_ROOT is set and is not a folder", pytrace=False)
    if not folder.is_dir():
        pytest.skip("the real corpora are not here: set FEDMENTOR_DATA_ROOT, or put them in ../shared/data")
    return str(folder)


@pytest.fixture(scope="module")
def raw(root):
    return load_study_data([Domain(name, CorpusSource(kind=name)) for name in NAMES], DataConfig(root=root))


def read(root, **source):
    counter = Counter()
    return read_corpus(CorpusSource(**source), root, counter), counter.total()


def test_files_are_those_of_the_catalogue(root):
    for name in NAMES:
        for file in catalogue()[name].files:
            assert hashlib.sha256((Path(root) / file.file).read_bytes()).hexdigest() == file.sha256, file.file


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["raw", "instruction", "completion"])
def test_every_row_is_read(root, name, form):
    listed = {file.file: file.n_rows for file in catalogue()[name].files}
    per_row = len(CORPORA[name].tasks) if form == "raw" else 1
    rows, repairs = read(root, kind=name, form=form)
    assert len(rows) == per_row * sum(listed[file] for file in CORPORA[name].files[form])
    assert repairs.malformed_dropped == 0
    assert repairs.malformed == (name == "dreaddit" and form != "raw")
    assert {row.question for row in rows} == {task.question for task in CORPORA[name].tasks}
    assert all(row.label for row in rows)


def test_all_mojibake_is_repaired(root, raw):
    # At least the rows that the data's own notes count; the notes leave out broken emoji and accents.
    for name, at_least in {"irf": 488 + 113 + 244, "multiwd": 626 + 187}.items():
        assert raw[name].repairs.mojibake >= at_least
        for file in CORPORA[name].files["raw"]:
            with (Path(root) / file).open(encoding="utf-8", newline="") as stream:
                for record in csv.DictReader(stream):
                    text = record["text"]
                    if "‚Ä" in text:
                        assert repair_mojibake(text)[0] == text.encode("mac_roman").decode("utf-8")
        for rows in raw[name].splits().values():
            assert not any("‚Ä" in text or "Ô∏" in text for text in rows["post"][:])
    assert raw["dreaddit"].repairs.mojibake == 0


def test_posts_and_their_overlap(raw):
    overlaps = {pair.domains: pair for pair in describe(raw).overlaps}
    assert overlaps["irf", "multiwd"].shared_posts == overlaps["irf", "multiwd"].shared_units == 3252
    assert overlaps["dreaddit", "irf"].shared_posts == overlaps["dreaddit", "multiwd"].shared_posts == 0
    assert all(pair.shared_posts_across_splits == 0 for pair in overlaps.values())
    assert len(raw["irf"].unit_digests()) == 3514
    assert len(raw["multiwd"].unit_digests()) == 3274


def test_no_post_is_in_two_splits_of_any_corpora(raw):
    places = {}
    for data in raw.values():
        for split, rows in data.splits().items():
            for post in rows["post"][:]:
                assert places.setdefault(post_key(post), split) == split


def test_a_site_alone_splits_as_all_together(root, raw):
    for name in NAMES:
        alone = load_domain_data(Domain(name, CorpusSource(kind=name)), DataConfig(root=root))
        assert alone.fingerprint == raw[name].fingerprint
        for split, rows in alone.splits().items():
            assert rows["unit_id"][:] == raw[name].splits()[split]["unit_id"][:]


def test_forms_mixed_across_domains_share_no_post_between_splits(root):
    domains = [
        Domain("dreaddit", CorpusSource(kind="dreaddit", form="instruction")),
        Domain("dreaddit_raw", CorpusSource(kind="dreaddit")),
        Domain("irf", CorpusSource(kind="irf", form="completion")),
        Domain("multiwd", CorpusSource(kind="multiwd", form="instruction")),
        Domain("irf_raw", CorpusSource(kind="irf")),
    ]
    report = describe(load_study_data(domains, DataConfig(root=root, split_seed=3)))
    overlaps = {pair.domains: pair for pair in report.overlaps}
    assert overlaps["irf", "irf_raw"].shared_posts > 1500
    assert overlaps["dreaddit", "dreaddit_raw"].shared_units > 2800
    assert all(pair.shared_posts_across_splits == 0 for pair in report.overlaps)


def test_duplicates_are_dropped(raw):
    for data in raw.values():
        asked: list[tuple[str, str]] = []
        for rows in data.splits().values():
            asked += zip(rows["post"][:], rows["question"][:], strict=True)
        assert len(asked) == len(set(asked))
    assert raw["dreaddit"].repairs.duplicates_dropped == 18 + 3


AGREEMENT = [
    ("dreaddit", "dreaddit/imhi_instruction_train.csv", {None: 98.5}),
    ("dreaddit", "dreaddit/imhi_instruction_val.csv", {None: 99.7}),
    ("dreaddit", "dreaddit/imhi_instruction_test.csv", {None: 99.3}),
    ("irf", "irf/imhi_instruction_val.csv", {"belongingness": 79.9, "burdensomeness": 75.6}),
    ("irf", "irf/imhi_instruction_test.csv", {"belongingness": 81.0, "burdensomeness": 75.6}),
    (
        "multiwd",
        "multiwd/imhi_instruction_test.csv",
        {
            "spiritual": 100.0,
            "physical": 83.5,
            "intellectual": 77.6,
            "social": 88.0,
            "vocational": 80.8,
            "emotional": 89.2,
        },
    ),
]


@pytest.mark.parametrize(("name", "file", "expected"), AGREEMENT, ids=[item[1] for item in AGREEMENT])
def test_agreement_of_answers_with_human_labels(root, name, file, expected):
    answers, _ = read(root, kind=name, form="instruction", files=[file], human_labels=False)
    joined, _ = read(root, kind=name, form="instruction", files=[file], human_labels=True)
    assert not any(row.gold for row in answers)
    for word, percent in expected.items():
        agree = [
            row.label == human.label
            for row, human in zip(answers, joined, strict=True)
            if human.gold and (word is None or word in row.question)
        ]
        # Dreaddit's texts with two human labels are not gold, and so not in these shares.
        assert 100 * sum(agree) / len(agree) == pytest.approx(percent, abs=0.25 if name == "dreaddit" else 0.06)


def test_irf_spans_become_reasons(root):
    rows, _ = read(root, kind="irf", files=["irf/raw_train.csv"])
    reasons = [row for row in rows if "Reasoning: the post says" in row.response]
    assert len(reasons) > 1600
    assert all(row.label == "yes" and row.gold for row in reasons)
