"""What a study on real text is told, and where its ledgers may not live."""

from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from fedmentor_core.privacy.precautions import missing_precautions, shared_ledger_refusal
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

COLUMNS = {
    "post": "text",
    "label": "stressed",
    "question_text": "Is it?",
    "yes_sentence": "Yes, it is.",
    "no_sentence": "No, it is not.",
}


@pytest.fixture
def real_study(tiny_study: dict) -> dict:
    source = {"kind": "csv", "path": "posts.csv", "columns": COLUMNS}
    tiny_study["domains"][0]["source"] = source
    return tiny_study


def config(study: dict, **privacy: Any) -> StudyConfig:
    return validate_config({**study, "privacy": privacy})


def test_invented_text_needs_none(tiny_study: dict) -> None:
    assert missing_precautions(config(tiny_study)) == ()


def test_real_text_is_told_of_its_account_and_its_key(real_study: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMENTOR_UNIT_KEY", raising=False)
    ledger, key = missing_precautions(config(real_study))
    assert "privacy.ledger_url is not set" in ledger
    assert "FEDMENTOR_UNIT_KEY is not set" in key
    monkeypatch.setenv("FEDMENTOR_UNIT_KEY", "a secret of the site")
    assert missing_precautions(config(real_study, ledger_url="file:///var/lib/ledgers")) == ()
    assert missing_precautions(config(real_study, mode="none")) == ()


@pytest.mark.parametrize(
    ("ledger_url", "refused"),
    [
        (None, True),
        ("s3://shared/study/ledgers", True),
        ("s3://shared/study", True),
        ("s3://shared", True),
        ("s3://shared/study-ledgers", False),
        ("s3://site-a/ledgers", False),
        ("file:///var/lib/ledgers", False),
    ],
)
def test_digests_of_real_posts_do_not_go_to_a_shared_store(
    real_study: dict, ledger_url: str | None, refused: bool
) -> None:
    real_study["storage"] = {"url": "s3://shared/study"}
    told = shared_ledger_refusal(config(real_study, ledger_url=ledger_url))
    assert (told is not None) == refused


def test_a_private_gate_has_accounts_even_in_a_run_without_privacy(real_study: dict) -> None:
    real_study["storage"] = {"url": "s3://shared/study"}
    assert shared_ledger_refusal(config(real_study, mode="none")) is None
    real_study["evaluation"] = {"gate_data": "private"}
    assert shared_ledger_refusal(config(real_study, mode="none")) is not None
    assert len(missing_precautions(config(real_study, mode="none"))) >= 1


def test_the_plan_refuses_before_anything_is_written(real_study: dict, tmp_path: Path) -> None:
    real_study["storage"] = {"url": "s3://shared/study"}
    workspace = Workspace(open_study(config(real_study), tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"Set privacy\.ledger_url"):
        workspace.make_plan()


def test_invented_text_may_share_a_store(tiny_study: dict) -> None:
    tiny_study["storage"] = {"url": "s3://shared/study"}
    assert shared_ledger_refusal(config(tiny_study)) is None
