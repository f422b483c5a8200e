"""The configuration of sources: discriminated, bounded, closed, and light to import."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from fedmentor_core.data.sources import (
    ColumnMapping,
    CorpusSource,
    DataConfig,
    HubSource,
    InventedSource,
    Source,
    TableSource,
)

ADAPTER = TypeAdapter(Source)
COLUMNS = {"post": "text", "label": "y", "question_text": "Is it late?"}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"kind": "invented", "corpus": "peer_forum", "n_units": 10}, InventedSource),
        ({"kind": "irf", "form": "instruction"}, CorpusSource),
        ({"kind": "csv", "path": "a.csv", "columns": COLUMNS}, TableSource),
        ({"kind": "jsonl", "path": "a.jsonl", "columns": COLUMNS}, TableSource),
        ({"kind": "hub", "name": "owner/name", "columns": COLUMNS}, HubSource),
    ],
)
def test_kind_chooses_the_source(value, kind):
    assert isinstance(ADAPTER.validate_python(value), kind)


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "dreadit"},
        {"kind": "irf", "form": "labels"},
        {"kind": "irf", "extra": 1},
        {"kind": "irf", "files": []},
        {"kind": "irf", "form": "raw", "human_labels": False},
        {"kind": "invented", "corpus": "peer_forum", "n_units": 2},
        {"kind": "csv", "path": "a.csv"},
    ],
)
def test_impossible_sources_are_refused(value):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(value)


@pytest.mark.parametrize(
    "columns",
    [
        {"post": "t", "question_text": "Q?"},
        {"post": "t", "label": "y"},
        {"post": "t", "label": "y", "question": "q", "question_text": "Q?"},
        {"post": "t", "response": "r", "question": "q", "reasoning": "why"},
        {"post": "t", "label": "y", "question": "q", "yes_values": ["1"], "no_values": ["1 "]},
    ],
)
def test_contradicting_mappings_are_refused(columns):
    with pytest.raises(ValidationError):
        ColumnMapping.model_validate(columns)


def test_split_fractions_must_leave_something_to_train_on():
    with pytest.raises(ValidationError, match="below 1"):
        DataConfig(gate_fraction=0.6, test_fraction=0.4)


def test_configuration_imports_no_heavy_library():
    code = (
        "import sys, fedmentor_core.data.sources\n"
        "print([n for n in ('torch', 'pandas', 'datasets', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
