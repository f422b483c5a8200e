"""Which store a study has: its configuration's, the one a worker was given, or a folder of its own."""

import json

import pytest

from fedmentor_core.audit.run import _prepare as prepare_audit
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from fedmentor_core.study_ref import find_study, ledgers_url, open_study
from flows.environment import STORE_VARIABLE, default_store


@pytest.fixture
def config(tiny_study):
    return validate_config(tiny_study)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """What the worker of a stack is told."""
    url = (tmp_path / "shared").as_uri()
    monkeypatch.setenv(STORE_VARIABLE, url)
    return url


def test_a_study_takes_the_workers_store_and_keeps_it(config, tmp_path, shared, monkeypatch):
    ref = open_study(config, tmp_path / "out", default_store())
    assert ref.store_url == ledgers_url(tmp_path / "out") == shared
    monkeypatch.delenv(STORE_VARIABLE)
    assert open_study(config, tmp_path / "out", default_store()).store_url == shared, "it resumes where it began"
    assert find_study(config, tmp_path / "new", default_store()).store_url == (tmp_path / "new" / "store").as_uri()


def test_a_configured_store_wins_and_a_wrong_one_is_refused(tiny_study, config, tmp_path, shared):
    own = (tmp_path / "own").as_uri()
    tiny_study["storage"] = {"url": own}
    assert find_study(validate_config(tiny_study), tmp_path / "out", shared).store_url == own
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        find_study(config, tmp_path / "out", "ftp://nowhere")


def test_a_study_that_began_in_its_folder_stays_there(config, tmp_path, shared):
    """Also one of an earlier version, whose marker names no store."""
    open_study(config, tmp_path / "out")
    marker = tmp_path / "out" / "study.json"
    facts = {key: value for key, value in json.loads(marker.read_text()).items() if not key.endswith("_url")}
    marker.write_text(json.dumps(facts))
    assert open_study(config, tmp_path / "out", default_store()).store_url == (tmp_path / "out" / "store").as_uri()
    assert ledgers_url(tmp_path / "out") == (tmp_path / "out" / "store").as_uri()


def test_an_audits_accounts_never_go_to_a_workers_store(config, tmp_path, shared):
    """They are not the lifetime accounts: mixed with those, each would pay for the others."""
    audit = prepare_audit(config, tmp_path / "audit", None, 10, units={one.name: 200 for one in config.domains})
    assert audit.ref.store_url == (tmp_path / "audit" / "store").as_uri()
