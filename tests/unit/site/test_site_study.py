"""Whole studies over two sites, with the real code on both ends and a transport that can fail; no Prefect."""

from pathlib import Path

import pytest
import yaml
from two_sites import Sites, at_sites, make_sites, server_of

from fedmentor_core import client_round
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import BudgetError, FedMentorError, SiteError
from fedmentor_core.rounds import RoundState, assignments_for, find_manifest
from fedmentor_core.site.asking import ask_plan, ask_training
from fedmentor_core.study import InProcess, run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace, workspace_of

pytestmark = pytest.mark.usefixtures("light")


class DeathError(BaseException):
    """A site's process that dies."""


def allow_seeded(sites: Sites) -> None:
    for site in sites.files:
        path = sites.folder / site / "policy.yaml"
        path.write_text(path.read_text() + "allow_not_private: true\n")


def statuses(summary, index: int = 0) -> dict[str, str]:
    return {client.domain: client.status for client in summary.rounds[index].clients}


def test_sites_give_the_same_adapters_as_one_machine(tiny_study, sites, tmp_path, store_url):
    tiny_study["privacy"] = {"noise_seed": 5}
    allow_seeded(sites)
    here = open_study(validate_config(tiny_study), tmp_path / "here")
    there, engine = server_of(tiny_study, sites, tmp_path / "out", store_url)
    one, two = run_study(here), run_study(there.ref, engine)
    for index in range(2):
        assert find_manifest(workspace_of(here), index).adapter.sha256 == find_manifest(there, index).adapter.sha256
    assert one.final == two.final
    assert [r.metrics for r in one.rounds] == [r.metrics for r in two.rounds]
    assert [c.epsilon_spent for r in one.rounds for c in r.clients] == [
        c.epsilon_spent for r in two.rounds for c in r.clients
    ]
    assert [d.noise_after for r in one.rounds for d in r.noise_decisions] == pytest.approx(
        [d.noise_after for r in two.rounds for d in r.noise_decisions]
    )


class Falling(InProcess):
    """Sites go down and come up before a round's training."""

    down: dict[int, set[str]]

    def train(self, assignments):
        self.deliver.__self__.down = self.down.get(assignments[0].round_index, set())
        return super().train(assignments)


def test_a_site_that_is_down_for_a_round_costs_that_round_and_its_gate(tiny_study, sites, tmp_path, store_url):
    workspace, _ = server_of(tiny_study, sites, tmp_path / "out", store_url)
    engine = Falling(workspace, deliver=sites.deliver)
    engine.down = {0: {"site-b"}}
    summary = run_study(workspace.ref, engine)
    assert statuses(summary, 0) == {"one": "trained", "two": "failed"}
    assert statuses(summary, 1) == {"one": "trained", "two": "trained"}
    first, second = (one.gate for one in summary.rounds)
    assert not first.passed
    assert any("'two' was not evaluated: site 'site-b' is down" in reason for reason in first.reasons)
    assert second.passed
    assert summary.selected_round == 1
    lost = next(client for client in summary.rounds[0].clients if client.domain == "two")
    after = next(client for client in summary.rounds[1].clients if client.domain == "two")
    assert "down" in lost.reason
    assert lost.epsilon_spent >= after.epsilon_spent, "what may be charged counts as charged until the site speaks"


def test_too_few_sites_stop_the_round_and_the_next_start_goes_on(tiny_study, sites, tmp_path, store_url):
    changes = {"aggregation": {"min_clients": 2}}
    workspace, _ = server_of(tiny_study, sites, tmp_path / "out", store_url, **changes)
    engine = Falling(workspace, deliver=sites.deliver)
    engine.down = {1: {"site-b"}}
    with pytest.raises(FedMentorError, match="1 usable updates"):
        run_study(workspace.ref, engine)
    sites.delivered.clear()
    engine.down = {}
    summary = run_study(workspace.ref, engine)
    assert [set(statuses(summary, index).values()) for index in range(2)] == [{"trained"}, {"trained"}]
    trained = [site for site, request in sites.delivered if request.kind == "train"]
    assert trained == ["site-b"], "what site-a had answered is not asked again"


def test_a_site_that_is_down_when_a_study_is_planned_takes_no_part(tiny_study, sites, tmp_path, store_url):
    sites.down.add("site-b")
    workspace, engine = server_of(tiny_study, sites, tmp_path / "out", store_url)
    plan = engine.plan()
    assert [one.domain for one in plan.domains] == ["one"]
    assert any("'two' takes no part" in warning for warning in plan.warnings)
    summary = run_study(workspace.ref, engine)
    assert statuses(summary) == {"one": "trained"}
    assert not any(one.gate.passed for one in summary.rounds)
    sites.down.add("site-a")
    _, engine = server_of(tiny_study, sites, tmp_path / "other", store_url)
    with pytest.raises(SiteError, match="0 of 2 domains can take part"):
        engine.plan()


def test_a_site_whose_policy_refuses_is_not_trained_on(tiny_study, sites, tmp_path, store_url):
    path = sites.folder / "site-b" / "policy.yaml"
    path.write_text(yaml.safe_dump({"domain": "two", "epsilon": 1.0}))
    workspace, engine = server_of(tiny_study, sites, tmp_path / "out", store_url)
    summary = run_study(workspace.ref, engine)
    assert statuses(summary) == {"one": "trained", "two": "rested"}
    assert "the site allows 1" in summary.rounds[0].clients[1].reason
    assert not (sites.folder / "site-b" / "ledger" / "ledgers").exists(), "no account was opened"


def test_all_sites_refusing_is_a_spent_or_refused_budget(tiny_study, sites, tmp_path, store_url):
    for site, domain in (("site-a", "one"), ("site-b", "two")):
        (sites.folder / site / "policy.yaml").write_text(yaml.safe_dump({"domain": domain, "epsilon": 1.0}))
    _, engine = server_of(tiny_study, sites, tmp_path / "out", store_url)
    with pytest.raises(BudgetError, match="no domain can train"):
        engine.plan()
    for site, domain in (("site-a", "one"), ("site-b", "two")):
        (sites.folder / site / "policy.yaml").write_text(yaml.safe_dump({"domain": domain, "epsilon": 8.0}))
    assert [one.refusals for one in engine.plan().domains] == [(), ()], "a refusal that was mended is asked about again"


def test_the_same_run_with_another_configuration_is_refused(tiny_study, sites, tmp_path, store_url, server):
    other = at_sites(tiny_study, sites) | {"storage": {"url": store_url}, "rounds": 5}
    ref = server.ref.model_copy(update={"config": validate_config(other)})
    with pytest.raises(SiteError, match="another configuration"):
        ask_plan(Workspace(ref), "one", sites.deliver)


def test_a_failure_at_a_site_tells_its_kind_and_no_place(tiny_study, sites, tmp_path, store_url, server):
    raw = yaml.safe_load(sites.files["site-a"].read_text())
    raw["domains"]["one"]["source"] = {
        "kind": "csv", "path": "gone.csv", "columns": {"post": "p", "question": "q", "response": "r"},
    }  # fmt: skip
    sites.files["site-a"].write_text(yaml.safe_dump(raw))
    assignment = assignments_for(server, RoundState.first(server))[0]
    with pytest.raises(SiteError) as failed:
        ask_training(server, assignment, sites.deliver)
    assert str(failed.value) == "site 'site-a': failed with DataError; the site's own log says where"
    seen = [path.read_bytes() for path in Path(store_url.removeprefix("file://")).rglob("*") if path.is_file()]
    assert not any(b"gone.csv" in content for content in seen)


def test_a_site_that_dies_in_training_is_charged_and_asked_again(sites, server, monkeypatch):
    assignment = assignments_for(server, RoundState.first(server))[0]
    original = client_round._train

    def die(*_):
        raise DeathError

    monkeypatch.setattr(client_round, "_train", die)
    with pytest.raises(DeathError):
        ask_training(server, assignment, sites.deliver)
    monkeypatch.setattr(client_round, "_train", original)
    update = ask_training(server, assignment, sites.deliver)
    assert (update.status, update.attempt) == ("trained", 1)
    asked = [request for _, request in sites.delivered if request.kind == "train"]
    assert asked[0] == asked[1], "the same attempt, for it was never answered"
    again = ask_training(server, assignment, sites.deliver)
    assert again == update


def test_shared_posts_are_refused_without_saying_how_many(tiny_study, sites, tmp_path, store_url, server):
    assignment = assignments_for(server, RoundState.first(server))[0]
    assert ask_training(server, assignment, sites.deliver).status == "trained"
    for path in (sites.files["site-a"], sites.folder / "site-a" / "policy.yaml"):
        path.write_text(path.read_text().replace("one:", "renamed:").replace("domain: one", "domain: renamed"))
    tiny_study["domains"][0]["name"] = "renamed"
    workspace, _ = server_of(tiny_study, sites, tmp_path / "other", store_url)
    plan = ask_plan(workspace, "renamed", sites.deliver)
    assert len(plan.refusals) == 1
    assert "the site's rule on posts" in plan.refusals[0]
    assert "%" not in plan.refusals[0]
    assert "'one'" not in plan.model_dump_json()


def test_a_private_gate_set_is_evaluated_at_its_site_and_charged_there(tiny_study, tmp_path, store_url):
    sites = make_sites(tmp_path / "sites", tiny_study["domains"], store_url, gate_data="private")
    tiny_study["evaluation"] |= {"gate_data": "private", "private": {"epsilon": 50.0}}
    workspace, engine = server_of(tiny_study, sites, tmp_path / "out", store_url)
    summary = run_study(workspace.ref, engine)
    assert statuses(summary) == {"one": "trained", "two": "trained"}
    assert summary.final.toxicity_max is None
    manifest = find_manifest(workspace, 0)
    assert manifest.samples == ()
    accounts = {path.name for path in (sites.folder / "site-a" / "ledger" / "ledgers").iterdir()}
    assert accounts == {"one", "one.gate", "one.test"}
    tiny_study["evaluation"]["gate_data"] = "public"
    _, other = server_of(tiny_study, sites, tmp_path / "public", store_url)
    with pytest.raises(SiteError, match="gate and test posts are private"):
        other.plan()


def test_a_site_with_a_store_of_its_own_writes_nowhere_else(tiny_study, sites, tmp_path, store_url):
    own = tmp_path / "own-of-b"
    sites.change("site-b", own_store={"url": own.as_uri()})
    raw = at_sites(tiny_study, sites) | {"storage": {"url": store_url}, "rounds": 1}
    raw["sites"]["site-b"]["store_url"] = own.as_uri()
    workspace = workspace_of(open_study(validate_config(raw), tmp_path / "out"))
    summary = run_study(workspace.ref, InProcess(workspace, deliver=sites.deliver))
    assert statuses(summary) == {"one": "trained", "two": "trained"}
    assert [path.name for path in own.iterdir() if not path.name.startswith(".")] == ["sites"]
    study_store = Path(store_url.removeprefix("file://"))
    assert [path.name for path in (study_store / "sites").iterdir()] == ["site-a"]
