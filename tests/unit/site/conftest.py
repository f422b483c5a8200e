"""A study whose two domains are at two sites: the server's side of it, planned by them."""

from pathlib import Path

import pytest
from two_sites import Sites, at_sites, make_sites

from fedmentor_core.config_io import validate_config
from fedmentor_core.site.asking import ask_plan
from fedmentor_core.site.planning import joined_plan
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


@pytest.fixture
def sites(tiny_study: dict, tmp_path: Path, store_url: str) -> Sites:
    return make_sites(tmp_path / "sites", tiny_study["domains"], store_url)


@pytest.fixture
def server(tiny_study: dict, sites: Sites, tmp_path: Path, store_url: str, monkeypatch) -> Workspace:
    """The server's workspace, planned by its sites."""
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    config = validate_config(at_sites(tiny_study, sites) | {"storage": {"url": store_url}})
    workspace = Workspace(open_study(config, tmp_path / "out"))
    plans = [ask_plan(workspace, name, sites.deliver) for name in ("one", "two")]
    workspace.settle_plan(joined_plan(workspace, plans, {}))
    return workspace
