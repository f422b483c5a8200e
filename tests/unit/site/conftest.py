"""A study whose two domains are at two sites: the server's side of it, planned by them."""

from pathlib import Path

import pytest
from two_sites import Sites, at_sites, make_sites

from fedmentor_core.config_io import validate_config
from fedmentor_core.evaluation.scores import RowScores
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


@pytest.fixture
def light(monkeypatch) -> None:
    """No PRV diagnostic, and scores without models: what is scored is not what is tested here."""

    def fake_rows(model, tokenizer, data, *_, on_batch=None, **__) -> list[RowScores]:
        return [
            RowScores(
                output="Yes.", reference=str(row["response"]), label="yes", answer="yes", bertscore_f1=0.8, rouge_l=0.5,
                toxicity=0.1, safe=True,
            )
            for row in data.rows
        ]  # fmt: skip

    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    monkeypatch.setattr("fedmentor_core.evaluation.evaluate.score_rows", fake_rows)
    monkeypatch.setattr("fedmentor_core.private_gate.score_rows", fake_rows)
