"""Studies and nights over two sites through a real Prefect server; each site's worker is a thread of the test.

The workers poll, take requests up and carry them out with the site's real code, as processes do in
``tests/e2e/test_sites.py``; here they can also be told to be slow.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypes
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Completed, Failed, Pending, Running
from two_sites import Sites, at_sites, make_sites

from fedmentor_core.adapters.lora import state_from_bytes
from fedmentor_core.config_io import validate_config
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.records import StudySummary
from fedmentor_core.rounds import find_manifest
from fedmentor_core.site.answering import answer_or_tell
from fedmentor_core.site.examine import find_entry
from fedmentor_core.site.requests import PlanRequest, TrainRequest, answer_key, parse_request
from fedmentor_core.storage.base import open_store
from fedmentor_core.study_ref import find_study
from fedmentor_core.workspace import workspace_of

pytestmark = [pytest.mark.usefixtures("light"), pytest.mark.slow]
Request = Any
IsSlow = Callable[[str, Request], bool]


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    """A throw-away Prefect server and database."""
    from prefect_harness import throwaway_prefect

    with throwaway_prefect():
        yield


class Workers:
    """Both sites' workers: they take up what Prefect has for them, in a thread each."""

    def __init__(self, sites: Sites, slow: IsSlow = lambda site, request: False) -> None:
        self.sites, self.slow = sites, slow
        self.answered: list[tuple[str, Request]] = []
        self.late: list[tuple[str, Request]] = []
        self.errors: list[BaseException] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Workers":
        with get_client(sync_client=True) as client:
            flow_id = client.create_flow_from_name("client-site")
            ids = {site: client.create_deployment(flow_id, site) for site in self.sites.files}
        for site, deployment_id in ids.items():
            if site not in self.sites.down:
                self._threads.append(threading.Thread(target=self._work, args=(site, deployment_id), daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        assert not self.errors, self.errors

    def _work(self, site: str, deployment_id: Any) -> None:
        try:
            with get_client(sync_client=True) as client:
                while not self._over.wait(0.1):
                    for run in _scheduled(client, deployment_id):
                        self._carry_out(client, site, run)
        except BaseException as error:
            self.errors.append(error)

    def _carry_out(self, client: SyncPrefectClient, site: str, run: FlowRun) -> None:
        client.set_flow_run_state(run.id, Pending())
        client.set_flow_run_state(run.id, Running())
        request = parse_request(run.parameters["request"])
        if self.slow(site, request):
            while client.read_flow_run(run.id).state.type != StateType.CANCELLING:
                if self._over.wait(0.1):
                    return
            self.late.append((site, request))
        failure = answer_or_tell(request, lambda: self.sites.file(site))
        self.answered.append((site, request))
        client.set_flow_run_state(run.id, Completed() if failure is None else Failed(message=failure.reason))


def _scheduled(client: SyncPrefectClient, deployment_id: Any) -> list[FlowRun]:
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=StateTypes(any_=[StateType.SCHEDULED]))),
    )


def run_flow(study: dict, out: Path) -> StudySummary:
    from flows.federated_training import federated_training

    return federated_training(validate_config(study), str(out))


def test_a_site_past_its_deadline_costs_that_round_and_its_late_answer_counts_nowhere(
    tiny_study, sites, tmp_path, store_url
):
    study = at_sites(tiny_study, sites, deadline_seconds=12, poll_seconds=0.1) | {"storage": {"url": store_url}}

    def slow(site: str, request: Request) -> bool:
        return site == "site-b" and isinstance(request, TrainRequest) and request.assignment.round_index == 0

    with Workers(sites, slow) as workers:
        summary = run_flow(study, tmp_path / "out")
    first, second = (one.clients for one in summary.rounds)
    assert [client.status for client in first] == ["trained", "failed"]
    assert first[1].reason == "site 'site-b' did not answer within 12 s, its deadline."
    assert [client.status for client in second] == ["trained", "trained"]

    (late,) = workers.late
    workspace = workspace_of(find_study(validate_config(study), tmp_path / "out"))
    assert workspace.store.exists(answer_key(*late)), "it was answered, too late"
    manifest = find_manifest(workspace, 0)
    folder = f"sites/site-a/one/runs/{summary.run_id}/rounds/0000/clients/one"
    sent = state_from_bytes(workspace.store.get_bytes(f"{folder}/update-000.safetensors"))
    made = workspace.get_adapter(manifest.adapter)
    assert all(torch.equal(sent[name], made[name]) for name in sent), "round 0 is site-a's update alone"
    later = [one.assignment for _, one in workers.answered if isinstance(one, TrainRequest)]
    assert {one.global_adapter for one in later if one.round_index == 1} == {manifest.adapter}

    ledger = ledger_of(sites, "site-b", "two")
    charged = [entry.round_index for entry in ledger.entries() if entry.kind == "charge"]
    assert charged == [0, 1], "what the site did late it was charged for"
    assert second[1].epsilon_spent == pytest.approx(ledger.view().epsilon_spent)
    assert run_flow(study, tmp_path / "out").rounds == summary.rounds, "a finished study does not take it up either"


def ledger_of(sites: Sites, site: str, account: str) -> Ledger:
    file = sites.file(site)
    return Ledger(open_store(file.ledger_url, file.written), account)


class Nights:
    """A nightly study over both sites, whose data may grow."""

    def __init__(self, study: dict, folder: Path, store_url: str, nights: int) -> None:
        study["rounds"] = 1
        study["evaluation"]["thresholds"] = [{"metric": "safe_rate", "at_least": 0.5, "relative_to": "champion"}]
        study["domains"][1] = study["domains"][1] | {"epsilon": 8.0, "sensitivity": None}
        self.sites = make_sites(folder / "sites", study["domains"], store_url)
        self.study = at_sites(study, self.sites, poll_seconds=0.1, start_within_seconds=20) | {
            "name": "nights-at-sites",
            "privacy": {"planned_runs": nights, "reserve_fraction": 0.1},
            "adaptation": {"rule": "fixed"},
            "storage": {"url": store_url},
            "tracking": {"enabled": True},
        }
        self.root = folder / "nights"

    def data_arrives(self, site: str, domain: str, units: int) -> None:
        import yaml

        raw = yaml.safe_load(self.sites.files[site].read_text())
        raw["domains"][domain]["source"]["n_units"] += units
        self.sites.files[site].write_text(yaml.safe_dump(raw))

    def night(self):
        from flows.nightly import nightly_retraining

        return nightly_retraining(validate_config(self.study), str(self.root))

    def entries(self) -> list[int]:
        return [len(ledger_of(self.sites, *one).entries()) for one in (("site-a", "one"), ("site-b", "two"))]


def test_nights_over_two_sites_until_their_budgets_stop_them(tiny_study, tmp_path, store_url, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    nights = Nights(tiny_study, tmp_path, store_url, nights=2)
    with Workers(nights.sites) as workers:
        first = nights.night()
        assert (first.outcome, first.model.version, first.champion_before) == ("promoted", "1", None)
        assert [one.planned_nights_left for one in first.domains] == [1, 1]

        workers.answered.clear()
        before = nights.entries()
        idle = nights.night()
        assert (idle.outcome, idle.model) == ("nothing_new", None)
        assert [type(request) for _, request in workers.answered] == [PlanRequest, PlanRequest], "no more was asked"
        assert nights.entries() == before, "a skipped night costs nothing"

        nights.data_arrives("site-b", "two", 20)
        second = nights.night()
        assert (second.outcome, second.model.version, second.champion_before) == ("promoted", "2", "1")
        assert [one.new_data for one in second.domains] == [False, True]
        assert second.domains[1].n_units > first.domains[1].n_units
        for earlier, later in zip(first.domains, second.domains, strict=True):
            assert later.epsilon_before == pytest.approx(earlier.epsilon_spent)
        shows_what_paid_at_each_site(nights, "2")

        nights.data_arrives("site-a", "one", 20)
        before = nights.entries()
        over = nights.night()
        assert over.outcome == "no_budget"
        assert "all 2 planned runs have charged its budget" in over.reason
        assert nights.entries() == before


def shows_what_paid_at_each_site(nights: Nights, version: str) -> None:
    """A site finds in its own ledger what the registered model names."""
    from fedmentor_core.lineage import LedgerHead
    from tasks.tracking import mlflow_client

    uri = f"sqlite:///{nights.root.resolve() / 'mlflow.db'}"
    tags = mlflow_client(uri).get_model_version("fedmentor-adapter", version).tags
    for site, domain in (("site-a", "one"), ("site-b", "two")):
        head = LedgerHead.model_validate_json(tags[f"fedmentor.ledger_head.{domain}"])
        entry = find_entry(nights.sites.file(site), head.sha256)
        assert (head.site, entry.kind) == (site, "release")
        assert entry == ledger_of(nights.sites, site, domain).entries()[-1]


def test_a_night_without_every_site_costs_nobody_anything(tiny_study, tmp_path, store_url, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    nights = Nights(tiny_study, tmp_path, store_url, nights=3)
    nights.study["sites"]["site-b"]["start_within_seconds"] = 2
    nights.sites.down.add("site-b")
    with Workers(nights.sites):
        report = nights.night()
    assert report.outcome == "site_down"
    assert "site 'site-b' is down" in report.reason
    assert nights.entries() == [0, 0], "site-a could have trained, for a model that nobody could have judged at site-b"
    assert (nights.root / report.night / "night.json").is_file()
