"""Nights of a study on data that arrives in between, in real Prefect runs, until the budget stops them."""

import csv
import json
from pathlib import Path

import pytest

from fedmentor_core import study
from fedmentor_core.adapters.lora import read_adapter_folder
from fedmentor_core.champion import fixed_champion
from fedmentor_core.config_io import validate_config
from fedmentor_core.data import invented
from fedmentor_core.errors import ConfigError, DataError
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.storage.local import LocalStore
from fedmentor_core.study_ref import find_study
from fedmentor_core.workspace import Workspace
from flows.night_folders import nights as night_folders
from flows.night_folders import only_one_night, unfinished_night
from tasks.registered_files import fetch_adapter
from tasks.registry import champion, rollback
from tasks.tracking import mlflow_client

NIGHTS = 3
NAME = "fedmentor-adapter"


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    """A throw-away Prefect server and database."""
    from prefect_harness import throwaway_prefect

    with throwaway_prefect():
        yield


class Nights:
    """A nightly study on a table of invented posts that grows."""

    def __init__(self, folder: Path, backbone: Path) -> None:
        self.table = folder / "posts.csv"
        self.root = folder / "nights"
        self.uri = f"sqlite:///{self.root / 'mlflow.db'}"
        self.units = 60
        self.study = {
            "name": "nightly-test",
            "seed": 3,
            "rounds": 1,
            "backbone": {"name": str(backbone), "max_length": 160},
            "adapter": {"rank": 2, "alpha": 4.0},
            "domains": [
                {
                    "name": "one",
                    "epsilon": 8.0,
                    "source": {
                        "kind": "csv",
                        "path": str(self.table),
                        "columns": {"post": "post", "question": "question", "response": "response"},
                    },
                }
            ],
            "training": {"steps_per_round": 2, "batch_size": 8, "microbatch_size": 8, "max_target_tokens": 40},
            "privacy": {"planned_runs": NIGHTS, "ledger_url": (folder / "ledgers").as_uri(), "reserve_fraction": 0.1},
            "adaptation": {"rule": "fixed"},
            "evaluation": {
                "gate_data": "public",
                "max_gate_examples": 3,
                "max_test_examples": 3,
                "max_new_tokens": 6,
                "thresholds": [
                    {"metric": "toxicity_mean", "at_most": 1.0},
                    {"metric": "safe_rate", "at_least": 0.5, "relative_to": "champion"},
                ],
            },
        }
        self.ledger = Ledger(LocalStore(folder / "ledgers"), "one")
        self.data_arrives(0)

    def data_arrives(self, units: int) -> None:
        self.units += units
        rows = invented.generate("peer_forum", self.units, 1)
        with self.table.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, ["post", "question", "response"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def night(self):
        from flows.nightly import nightly_retraining

        report = nightly_retraining(validate_config(self.study), str(self.root))
        written = json.loads((self.root / report.night / "night.json").read_text())
        assert written == report.model_dump(mode="json")
        return report

    def workspace(self, night: str) -> Workspace:
        from flows.nightly import night_config

        return Workspace(find_study(night_config(validate_config(self.study), self.root), self.root / night))

    def spent_by_run(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for entry in self.ledger.entries():
            if entry.kind == "charge":
                found[entry.run_id] = found.get(entry.run_id, 0.0) + entry.rdp_charge
        return found


@pytest.fixture
def nights(tmp_path, tiny_backbone_folder, monkeypatch) -> Nights:
    monkeypatch.setenv("FEDMENTOR_UNIT_KEY", "11" * 32)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Nights(tmp_path, tiny_backbone_folder)


@pytest.mark.slow
def test_nights_until_the_budget_stops_them(nights):
    first = nights.night()
    assert (first.outcome, first.champion_before, first.model.version) == ("promoted", None, "1")
    assert first.domains[0].nights_left == first.domains[0].planned_nights_left == NIGHTS - 1
    gate = nights.workspace(first.night).store
    summary = json.loads((nights.root / first.night / "summary.json").read_text())
    assert [line["note"] for line in summary["rounds"][0]["gate"]["results"]] == ["", "there is no champion yet"]
    assert list(gate.list_keys(f"runs/{first.run_id}/models")) == [f"runs/{first.run_id}/models/{NAME}-1.json"]

    before = nights.ledger.entries()
    idle = nights.night()
    assert (idle.outcome, idle.model, idle.run_id) == ("nothing_new", None, None)
    assert "no domain has new units since the data of champion version 1" in str(idle)
    assert not idle.domains[0].new_data
    assert nights.ledger.entries() == before, "a skipped night costs nothing"
    assert not (nights.root / idle.night / "study.json").exists()

    nights.data_arrives(20)
    second = nights.night()
    assert (second.outcome, second.champion_before, second.model.version) == ("promoted", "1", "2")
    assert second.domains[0].new_data
    assert second.domains[0].n_units > first.domains[0].n_units
    assert second.domains[0].epsilon_before == first.domains[0].epsilon_spent
    starts_from_the_champion(nights, second.night, "1")
    summary = json.loads((nights.root / second.night / "summary.json").read_text())
    compared = summary["rounds"][0]["gate"]["results"][1]
    assert (compared["relative_to"], compared["note"]) == ("champion", "")
    assert compared["bound"] is not None
    tags = mlflow_client(nights.uri).get_model_version(NAME, "2").tags
    assert tags["fedmentor.started_from"] == f"{NAME}/1"
    assert tags["previous_champion"] == "1"

    rollback(nights.uri, NAME, reason="complaint")
    third = nights.night()  # what is new to the restored champion is new again
    assert (third.outcome, third.champion_before, third.model.version) == ("promoted", "1", "3")
    starts_from_the_champion(nights, third.night, "1")
    assert third.nights_left == third.domains[0].planned_nights_left == 0

    nights.data_arrives(20)
    before = nights.ledger.entries()
    over = nights.night()
    assert over.outcome == "no_budget"
    assert f"all {NIGHTS} planned runs have charged its budget" in over.reason
    assert nights.ledger.entries() == before
    assert champion(nights.uri, NAME).version == "3"

    names = [path.name for path in sorted(nights.root.iterdir()) if path.name[:2] == "20"]
    assert [name.rpartition("-")[2] for name in names] == ["1", "2", "3", "4", "5"]
    account = nights.ledger.account()
    spent = nights.spent_by_run()
    assert set(spent) == {first.run_id, second.run_id, third.run_id}
    before = 0.0
    for number, report in enumerate((first, second, third)):
        share = (account.rdp_budget - before) / (NIGHTS - number)
        assert spent[report.run_id] <= share * (1 + 1e-9), "no night beyond its share of what was left"
        before += spent[report.run_id]
    assert before <= account.rdp_budget
    for report in (first, second, third):
        assert report.domains[0].epsilon_spent <= report.domains[0].epsilon_limit * (1 + 1e-9)
    assert third.domains[0].epsilon_spent == pytest.approx(nights.ledger.view().epsilon_spent)


def starts_from_the_champion(nights: Nights, night: str, version: str) -> None:
    """The night's first adapter, frozen and trained, is tensor for tensor what the registry holds."""
    workspace = nights.workspace(night)
    assert fixed_champion(workspace).champion.version == version
    folder = nights.root / f"fetched for {night}"
    folder.mkdir()
    _, registered = read_adapter_folder(fetch_adapter(mlflow_client(nights.uri), nights.uri, NAME, version, folder))
    start = workspace.full_adapter_state(workspace.initial_adapter.trained)
    assert set(start) == set(registered)
    assert all(start[name].equal(registered[name]) for name in start)
    trained = [name for name in start if "lora_B" in name]
    assert any(start[name].abs().sum() > 0 for name in trained), "the champion was trained: its B is not zero"
    assert all(tensor.abs().sum() == 0 for name, tensor in workspace.get_adapter(workspace.untrained_adapter).items())


@pytest.mark.slow
def test_a_night_that_does_not_fit_or_is_worse_leaves_the_champion_alone(nights):
    nights.night()
    nights.data_arrives(20)
    before, adapter = nights.ledger.entries(), nights.study["adapter"]
    nights.study["adapter"] = {"rank": 4, "alpha": 16.0}
    with pytest.raises(ConfigError, match=r"its rank is 2; its scale alpha / rank is 2.*with rank 4 and scale 4"):
        nights.night()
    assert nights.ledger.entries() == before, "refused before any charge"
    assert champion(nights.uri, NAME).version == "1"
    nights.study["adapter"] = adapter
    nights.study["evaluation"]["thresholds"][1] = {
        "metric": "safe_rate", "at_least": 1.0, "offset": 0.5, "relative_to": "champion",
    }  # fmt: skip
    held = nights.night()
    assert (held.outcome, held.model.aliases) == ("held", ("challenger",))
    assert "(from the champion)" in held.reason
    assert champion(nights.uri, NAME).version == "1"


@pytest.mark.slow
def test_a_night_cut_short_is_taken_up_again_or_given_up(nights, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study.rounds, "commit_round", die)
        with pytest.raises(BaseException):  # noqa: B017, PT011  whatever Prefect makes of an interruption
            nights.night()
    charged = nights.spent_by_run()
    assert len(charged) == 1
    night = nights.night()
    assert (night.outcome, night.resumed) == ("promoted", True)
    assert night.night.endswith("-1")
    assert nights.spent_by_run() == charged, "the finished update is handed out again, and not paid for twice"

    nights.data_arrives(20)
    with monkeypatch.context() as patch:
        patch.setattr(study.rounds, "commit_round", die)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            nights.night()
    nights.data_arrives(20)
    fresh = nights.night()
    assert (fresh.outcome, fresh.resumed) == ("promoted", False)
    assert fresh.night.endswith("-3")
    left = json.loads((nights.root / (fresh.night.rpartition("-")[0] + "-2")).joinpath("night.json").read_text())
    assert (left["outcome"], left["reason"]) == ("abandoned", "its data changed since")
    assert len(nights.spent_by_run()) == 3, "what the abandoned night charged stays charged"


def test_what_cannot_be_repeated_every_night_is_refused(nights):
    from flows.nightly import nightly_retraining

    for change, message in [
        ({"privacy": {"planned_runs": 3}}, "privacy.ledger_url is not set"),
        (
            {"evaluation": {**nights.study["evaluation"], "thresholds": [{"metric": "safe_rate", "at_least": 0.5}]}},
            "compares nothing with the champion",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            nightly_retraining(validate_config({**nights.study, **change}), str(nights.root))
    assert not nights.root.exists()


def test_only_one_night_at_a_time(nights):
    with only_one_night(nights.root), pytest.raises(ConfigError, match="is running already"):
        nights.night()


@pytest.mark.slow
def test_a_night_that_fails_twice_is_given_up(nights, monkeypatch):
    """What fails every time would otherwise be taken up every night."""

    def fail(*_, **__):
        raise DataError("the table is locked.")

    monkeypatch.setattr(study.rounds, "assignments_for", fail)
    for begun in (True, False):
        with pytest.raises(DataError):
            nights.night()
        assert (unfinished_night(nights.root) is not None) is begun
    (night,) = night_folders(nights.root)
    left = json.loads((night / "night.json").read_text())
    assert (left["outcome"], left["reason"]) == ("abandoned", "it failed again: the table is locked.")
