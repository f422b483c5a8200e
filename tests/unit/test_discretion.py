"""What may be told of failures, warnings and log lines: never their text."""

import inspect
import logging
import traceback
import warnings

import pytest

from fedmentor_core.discretion import WithheldError, discreet, places_of, tellable, texts_withheld
from fedmentor_core.errors import DataError

TEXT = "words that only the private post holds"


@discreet
def step(error: Exception) -> None:
    """A step that fails on data."""
    try:
        raise KeyError(TEXT)
    except KeyError as cause:
        error.add_note(TEXT)
        raise error from cause


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError(TEXT), "failed with ValueError"),
        (DataError("rows.csv: row 3 is empty."), "rows.csv: row 3 is empty."),
    ],
)
def test_neither_text_nor_cause_nor_note_comes_out(error, message):
    kind = DataError if isinstance(error, DataError) else WithheldError
    with pytest.raises(kind) as caught:
        step(error)
    assert str(caught.value) == message
    assert TEXT not in "".join(traceback.format_exception(caught.value))


def test_the_log_says_where_and_not_what(caplog):
    with pytest.raises(WithheldError):
        step(ValueError(TEXT))
    assert "step failed with ValueError" in caplog.text
    assert f"{__file__}:" in caplog.text
    assert TEXT not in caplog.text


def test_places_are_files_lines_and_functions():
    try:
        raise ValueError(TEXT)
    except ValueError as error:
        shown = places_of(error)
    assert shown.endswith("in test_places_are_files_lines_and_functions")
    assert TEXT not in shown


def test_the_signature_that_an_orchestrator_reads_is_kept():
    assert list(inspect.signature(step).parameters) == ["error"]
    assert step.__name__ == "step"


def test_a_library_may_say_that_it_spoke_but_not_what(caplog):
    library = logging.getLogger("a.library")
    with texts_withheld(), texts_withheld():
        library.error("odd input: %s", TEXT)
        try:
            raise ValueError(TEXT)
        except ValueError:
            library.exception("failed on %s", TEXT)
        logging.getLogger("prefect.flow_runs").error("a line of the orchestrator")
    assert [record.getMessage().split(" at ")[0] for record in caplog.records] == [
        "text withheld, logged", "text withheld, logged", "a line of the orchestrator",
    ]  # fmt: skip
    assert TEXT not in caplog.text


def test_a_name_that_only_begins_like_an_open_one_is_not_open(caplog):
    with texts_withheld():
        logging.getLogger("mlflowish").error(TEXT)
    assert TEXT not in caplog.text


def test_a_warning_keeps_kind_and_place_only():
    with texts_withheld():
        shown = warnings.formatwarning(UserWarning(TEXT), UserWarning, "module.py", 7, f"warn({TEXT!r})")
    assert shown == "module.py:7: UserWarning, text withheld\n"


def test_everything_is_put_back_afterwards(caplog):
    before = logging.getLogRecordFactory(), warnings.formatwarning
    with texts_withheld():
        assert logging.getLogRecordFactory() is not before[0]
        with texts_withheld():
            pass
        assert logging.getLogRecordFactory() is not before[0], "an inner block must not end the outer one's"
    assert (logging.getLogRecordFactory(), warnings.formatwarning) == before


def test_our_own_error_keeps_its_class():
    assert isinstance(tellable(DataError("x")), DataError)
