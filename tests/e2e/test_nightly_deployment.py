"""The deployment ``nightly``, run through Prefect's API by a worker process, with data that arrives in between."""

import csv
import json
from pathlib import Path

import pytest
from prefect_service import until

from fedmentor_core.data import invented
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.storage.local import LocalStore

NIGHTS = 2
DEPLOYMENT = "nightly-retraining/nightly"
pytestmark = pytest.mark.slow


class Nights:
    """A nightly study on a table of invented posts that grows, and the deployment that lives its nights."""

    def __init__(self, service, folder: Path, backbone: Path) -> None:
        self.service = service
        self.table, self.root = folder / "posts.csv", folder / "nights"
        self.ledger = Ledger(LocalStore(folder / "ledgers"), "one")
        self.units = 60
        columns = {"post": "post", "question": "question", "response": "response"}
        self.study = {
            "name": "nightly-deployed",
            "seed": 3,
            "rounds": 1,
            "backbone": {"name": str(backbone), "max_length": 160},
            "adapter": {"rank": 2, "alpha": 4.0},
            "domains": [
                {
                    "name": "one",
                    "epsilon": 8.0,
                    "source": {"kind": "csv", "path": str(self.table), "columns": columns},
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
                "thresholds": [{"metric": "safe_rate", "at_least": 0.5, "relative_to": "champion"}],
            },
        }
        self.data_arrives(0)

    def data_arrives(self, units: int) -> None:
        self.units += units
        with self.table.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, ["post", "question", "response"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(invented.generate("peer_forum", self.units, 1))

    def start(self) -> str:
        return self.service.start_deployment(DEPLOYMENT, config=self.study, out_dir=str(self.root))

    def night(self, *, starts: int = 1) -> dict:
        """Live one night through the deployment, which may be started more than once meanwhile; what it left."""
        known = set(self.root.glob("*/night.json"))
        begun = [self.start() for _ in range(starts)]
        ends = sorted(self.service.ended(run_id) for run_id in begun)
        assert ends == ["CANCELLED"] * (starts - 1) + ["COMPLETED"], self.service.log("server")
        (left,) = set(self.root.glob("*/night.json")) - known
        return json.loads(left.read_text())

    def charges(self) -> list[str]:
        return [entry.run_id for entry in self.ledger.entries() if entry.kind == "charge"]


def test_nights_by_the_deployment_until_the_budget_stops_them(service, tmp_path, tiny_backbone_folder):
    nights = Nights(service, tmp_path, tiny_backbone_folder)
    first = nights.night(starts=2)  # one night at a time: the deployment's limit cancels the other start
    assert (first["outcome"], first["champion_before"], first["model"]["version"]) == ("promoted", None, "1")
    assert first["domains"][0]["planned_nights_left"] == NIGHTS - 1
    charged = nights.charges()
    assert set(charged) == {first["run_id"]}

    idle = nights.night()
    assert (idle["outcome"], idle["model"]) == ("nothing_new", None)
    assert nights.charges() == charged, "a skipped night costs nothing"

    nights.data_arrives(20)
    second = nights.night()
    assert (second["outcome"], second["champion_before"], second["model"]["version"]) == ("promoted", "1", "2")
    assert second["domains"][0]["n_units"] > first["domains"][0]["n_units"]
    assert second["domains"][0]["epsilon_before"] == first["domains"][0]["epsilon_spent"]
    assert set(nights.charges()) == {first["run_id"], second["run_id"]}

    nights.data_arrives(20)
    charged = nights.charges()
    over = nights.night()
    assert over["outcome"] == "no_budget"
    assert f"all {NIGHTS} planned runs have charged its budget" in over["reason"]
    assert nights.charges() == charged
    account = nights.ledger.account()
    assert nights.ledger.spent_rdp() <= account.rdp_budget
    reports = service.call("/artifacts/filter", {"artifacts": {"key": {"any_": ["nightly-deployed-nightly"]}}})
    titles = sorted(report["data"].splitlines()[0].split(": ")[1] for report in reports)
    assert titles == ["no budget", "nothing new", "promoted", "promoted"], "each night left its short report in Prefect"


def test_the_schedule_plans_the_nights(service):
    """The deployment's cron line makes runs by itself; that they can be started by hand does not show it."""
    deployment = service.call("/deployments/name/nightly-retraining/nightly")["id"]
    planned = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    runs = until(lambda: service.call("/flow_runs/filter", planned), 90, f"planned nights: {service.log('prefect')}")
    assert all(run["auto_scheduled"] for run in runs)
    assert {run["expected_start_time"][11:16] for run in runs} == {"02:00"}
