"""The champion over the seam: sites start from it, judge it on their own sets, and hold the ledger that pays for it."""

from pathlib import Path

import pytest
from two_sites import Sites, make_sites, server_of
from typer.testing import CliRunner

from fedmentor_core import client_round
from fedmentor_core import study as story
from fedmentor_core.adapters.lora import adapter_state, attach, resolved_targets, save_adapter_folder
from fedmentor_core.champion import fix_champion
from fedmentor_core.config import AdapterConfig
from fedmentor_core.lineage import lineage_of
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.records import ArtifactRef, StudySummary
from fedmentor_core.site.examine import find_entry
from fedmentor_core.storage.base import open_store
from fedmentor_core.study import run_study
from fedmentor_core.workspace import Workspace
from flows.cli import app

pytestmark = pytest.mark.usefixtures("light")


@pytest.fixture
def private_study(tiny_study: dict) -> dict:
    tiny_study["rounds"] = 1
    tiny_study["tracking"] = {"enabled": True}  # never used: the champion is fixed below, as the flow does
    tiny_study["evaluation"] |= {
        "gate_data": "private",
        "private": {"epsilon": 50.0},
        "thresholds": [{"metric": "safe_rate", "at_least": 0.1, "relative_to": "champion"}],
    }
    return tiny_study


@pytest.fixture
def private_sites(private_study: dict, tmp_path: Path, store_url: str) -> Sites:
    return make_sites(tmp_path / "sites", private_study["domains"], store_url, gate_data="private")


def crowned(workspace: Workspace, folder: Path, config: AdapterConfig) -> ArtifactRef:
    """Fix a champion of that shape, with every tensor at one tenth, as the flow does when a study starts."""
    model = attach(workspace.backbone, config, seed=9)
    state = {name: tensor * 0 + 0.1 for name, tensor in adapter_state(model, trainable_only=False).items()}
    save_adapter_folder(folder, state, config, resolved_targets(model))
    fixed = fix_champion(
        workspace, folder, name="m", version="3", adapter_sha256="a" * 64, backbone_sha256=workspace.backbone.sha256
    )
    assert fixed.champion is not None
    return fixed.champion.adapter


def values_of(model) -> set[float]:
    """The least and the largest value of each of an adapter's tensors."""
    tensors = adapter_state(model, trainable_only=False).values()
    return {round(float(value), 6) for tensor in tensors for value in (tensor.min(), tensor.max())}


def judged_with(monkeypatch) -> list[set[float]]:
    """Which values the adapter has whenever a site scores its gate or test set."""
    from fedmentor_core import private_gate

    seen: list[set[float]] = []
    fake = private_gate.score_rows

    def spy(model, *arguments, **more):
        seen.append(values_of(model))
        return fake(model, *arguments, **more)

    monkeypatch.setattr("fedmentor_core.private_gate.score_rows", spy)
    return seen


def test_each_site_judges_the_champion_on_its_own_private_set_and_pays_there(
    private_study, private_sites, tmp_path, store_url, monkeypatch
):
    sites = private_sites
    workspace, engine = server_of(private_study, sites, tmp_path / "out", store_url)
    champion = crowned(workspace, tmp_path / "champion", AdapterConfig(rank=2, alpha=4.0, target_modules=("q_proj",)))
    seen, judged = judged_with(monkeypatch), []
    original = story.judge
    monkeypatch.setattr(story, "judge", lambda *given: judged.append(given[2]) or original(*given))
    summary = run_study(workspace.ref, engine)

    asked = [(site, one) for site, one in sites.delivered if one.kind == "evaluate" and one.champion is not None]
    assert [(site, one.split, one.adapter) for site, one in asked] == [
        ("site-a", "gate", champion), ("site-b", "gate", champion),
    ]  # fmt: skip
    assert seen.count({0.1}) == 2, "another rank and other modules than the study's: the champion's own"
    for site, domain in (("site-a", "one"), ("site-b", "two")):
        file = sites.file(site)
        entries = Ledger(open_store(file.ledger_url, file.written), f"{domain}.gate").entries()
        paid = [entry.kind for entry in entries if entry.adapter_sha256 == champion.sha256]
        assert paid == ["evaluation", "release"]
    line = summary.rounds[0].gate.results[0]
    assert (line.relative_to, line.note) == ("champion", "")
    assert line.bound == pytest.approx(0.1 * judged[0]["champion"].safe_rate)
    assert set(judged[0]["champion"].by_domain) == {"one", "two"}


def test_sites_train_from_the_champion_its_frozen_factors_included(
    private_study, private_sites, tmp_path, store_url, monkeypatch
):
    private_study["start_from"] = "champion"
    workspace, engine = server_of(private_study, private_sites, tmp_path / "out", store_url)
    crowned(workspace, tmp_path / "champion", AdapterConfig(rank=4, alpha=8.0))
    started = []
    original = client_round.train_locally

    def spy(model, *arguments, **more):
        started.append(values_of(model))
        return original(model, *arguments, **more)

    monkeypatch.setattr(client_round, "train_locally", spy)
    summary = run_study(workspace.ref, engine)
    assert [client.status for client in summary.rounds[0].clients] == ["trained", "trained"]
    assert started == [{0.1}, {0.1}]
    for _, request in private_sites.delivered:
        for ref in request.places_read:
            assert ref.key.startswith(f"runs/{workspace.ref.run_id}/adapters/"), "all that a site reads of the server"


def ran(private_study, sites, out: Path, store_url: str) -> tuple[Workspace, StudySummary]:
    private_study["evaluation"]["thresholds"] = [{"metric": "safe_rate", "at_least": 0.1}]
    workspace, engine = server_of(private_study, sites, out, store_url)
    return workspace, run_study(workspace.ref, engine)


def test_the_lineage_names_the_entry_that_paid_at_each_site(private_study, private_sites, tmp_path, store_url):
    sites = private_sites
    workspace, summary = ran(private_study, sites, tmp_path / "out", store_url)
    adapter = workspace.initial_adapter.trained
    heads = {head.account: head for head in lineage_of(workspace, summary, adapter, "rev").heads}
    assert {name: head.site for name, head in heads.items()} == {"one": "site-a", "two": "site-b"}
    for name, head in heads.items():
        file = sites.file(head.site)
        newest = Ledger(open_store(file.ledger_url, file.written), name).chain()[-1]
        assert find_entry(file, head.sha256) == newest.entry
        assert (newest.entry.kind, newest.entry.run_id) == ("release", workspace.ref.run_id)
        assert head.sha256 != newest.sha256, "what is told could be tried out, if the site's key were not in it"
        assert head.epsilon_spent > 0
    assert find_entry(sites.file("site-b"), heads["one"].sha256) is None


def test_a_site_finds_again_what_its_ledger_was_named_by(private_study, private_sites, tmp_path, store_url):
    _, summary = ran(private_study, private_sites, tmp_path / "out", store_url)
    told = summary.rounds[0].clients[0].ledger_entry

    def asked(text: str):
        return CliRunner().invoke(app, ["site", "entry", text, "--file", str(private_sites.files["site-a"])])

    found = asked(told)
    assert found.exit_code == 0, found.output
    assert "account one" in found.output
    assert "(release)" in found.output
    assert asked("0" * 64).exit_code == 3
