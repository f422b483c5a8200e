"""Thirty nightly runs on one lifetime account, with kills at every step of a round and failing attempts.

Epsilon is counted again by integrating its definition, from what really happened: a meter inside Opacus notes every noising, and
the noised bytes lie in the nights' stores. The ledger must never say less, and must say exactly as much where nothing
was interrupted.
"""

import json
import math
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nights import RESTED
from scipy.integrate import quad

from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.storage.local import LocalStore

NIGHTS, STEPS, ROUNDS = 30, 2, 2
FAILING = {24: 1, 25: 1, 26: 1, 27: 1, 28: 1}
"""Nights on which attempts fail first: five retries in all."""


class Nights:
    """Runs nights in processes of their own and reads what they left, without the ledger's code."""

    def __init__(self, folder: Path, study: dict[str, Any]) -> None:
        self.folder = folder
        self.study = study
        self.meter = folder / "meter.jsonl"
        self.meter.touch()
        self.killed: list[str] = []
        driver = [sys.executable, str(Path(__file__).with_name("nights.py"))]
        self._driver = subprocess.Popen(driver, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, night: int, kill_at: str = "", failures: int = 0) -> int:
        """Exit code: 0 done, RESTED, or minus the signal."""
        asked = {
            "config": self.study,
            "out": str(self.folder / f"night-{night:02d}"),
            "meter": str(self.meter),
            "kill_at": kill_at,
            "failures": failures,
        }
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(json.dumps(asked) + "\n")
        self._driver.stdin.flush()
        return int(self._driver.stdout.readline())

    def close(self) -> None:
        self._driver.communicate()

    def entries(self, kind: str) -> list[dict[str, Any]]:
        folder = self.folder / "ledgers" / "ledgers" / "one"
        found = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
        return [entry for entry in found if entry["kind"] == kind]

    def steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.meter.read_text().splitlines()]

    def updates(self) -> dict[str, bytes]:
        found = self.folder.glob("night-*/store/runs/*/rounds/*/clients/one/update-*.safetensors")
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}


def recount(events: list[tuple[float, float, int]], order: float, delta: float) -> tuple[float, float]:
    """RDP and epsilon at ``order`` of (noise multiplier, sample rate, steps), by integrating the definition.

    No library: the Renyi divergence of the sampled Gaussian from N(0, sigma^2), one event at a time, and the
    conversion written out. (dp_accounting interpolates between whole orders and is half a percent above it here.)
    """
    rho = math.fsum(steps * renyi(noise, rate, order) for noise, rate, steps in events)
    return rho, rho - (math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)


@lru_cache
def renyi(noise: float, rate: float, order: float) -> float:
    def integrand(z: float) -> float:
        log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise**2))
        return math.exp(-(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi)) + order * log_ratio)

    total, _ = quad(integrand, -40 * noise, 40 * noise + 3 * order, limit=2000, points=[0, order])
    return math.log(total) / (order - 1)


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Iterator[Nights]:
    """Thirty nights, lived through once."""
    folder = tmp_path_factory.mktemp("nights")
    study = {
        "name": "nightly",
        "seed": 3,
        "rounds": ROUNDS,
        "backbone": {"name": str(tiny_backbone_folder), "max_length": 160},
        "adapter": {"rank": 2, "alpha": 4.0},
        "domains": [
            {"name": "one", "source": {"kind": "invented", "corpus": "peer_forum", "n_units": 60}, "epsilon": 8.0}
        ],
        "training": {"steps_per_round": STEPS, "batch_size": 8, "microbatch_size": 8, "max_target_tokens": 32},
        "privacy": {"planned_runs": NIGHTS, "ledger_url": (folder / "ledgers").as_uri(), "reserve_fraction": 0.1},
        "adaptation": {"rule": "paper", "threshold": 0.9},
        "evaluation": {"gate_data": "public"},
        "tracking": {"enabled": False},
    }
    lived = Nights(folder, study)
    kill_every_step(lived)
    for night in range(NIGHTS):
        code = lived.run(night, failures=FAILING.get(night, 0))
        assert code == 0, f"night {night} ended with {code}"
    yield lived
    lived.close()


def kill_every_step(lived: Nights) -> None:
    """Kill nights 0, 1, 2, ... each at a later write, then at a step, until a night survives its own."""
    killed = lived.killed
    for number in range(1, 40):
        night = min(len(killed), 23)
        code = lived.run(night, kill_at=f"write {number}")
        if code == 0:
            break
        assert code == -signal.SIGKILL, f"write {number}: {code}"
        killed.append(f"write {number}")
    else:
        pytest.fail("a night has more writes than expected")
    for number in (1, STEPS, STEPS + 1):
        code = lived.run(23, kill_at=f"step {number}")
        if code == -signal.SIGKILL:
            killed.append(f"step {number}")


def test_every_write_of_a_round_was_a_place_to_die(nights: Nights) -> None:
    assert len([where for where in nights.killed if where.startswith("write")]) >= 12


def test_ledger_equals_an_independent_count_of_its_charges(nights: Nights) -> None:
    charges = nights.entries("charge")
    order, delta = charges[0]["rdp_order"], charges[0]["delta"]
    rho, epsilon = recount(
        [(entry["noise_multiplier"], entry["sample_rate"], entry["steps"]) for entry in charges], order, delta
    )
    view = Ledger(LocalStore(nights.folder / "ledgers"), "one").view()
    assert view.epsilon_spent == pytest.approx(epsilon, abs=1e-4)
    assert math.fsum(entry["rdp_charge"] for entry in charges) == pytest.approx(rho, rel=1e-6)
    assert view.epsilon_spent <= view.epsilon_budget == 8.0
    assert len({entry["run_id"] for entry in charges}) == NIGHTS


def test_nothing_happened_that_was_not_charged(nights: Nights) -> None:
    """Every step that the meter saw is in a charge of the same night at the same noise and rate."""
    night_of = {
        json.loads((nights.folder / f"night-{n:02d}" / "study.json").read_text())["run_id"]: f"night-{n:02d}"
        for n in range(NIGHTS)
    }
    charged: Counter[tuple[str, float]] = Counter()
    for entry in nights.entries("charge"):
        charged[night_of[entry["run_id"]], entry["noise_multiplier"]] += entry["steps"]
    happened = Counter((step["night"], step["noise"]) for step in nights.steps())
    assert all(step["expected"] == pytest.approx(8) for step in nights.steps())
    assert all(happened[key] <= charged[key] for key in happened)
    assert set(happened) <= set(charged)
    quiet = {f"night-{n:02d}" for n in range(NIGHTS) if n not in FAILING} - killed_nights(nights)
    assert quiet, "no night was left alone"
    assert all(happened[key] == charged[key] for key in charged if key[0] in quiet)


def killed_nights(nights: Nights) -> set[str]:
    writes = [where for where in nights.killed if where.startswith("write")]
    return {f"night-{min(index, 23):02d}" for index in range(len(writes) + 1)} | {"night-23"}


def test_all_that_left_was_released_with_its_digest_and_charged_once(nights: Nights) -> None:
    updates = nights.updates()
    digests = {sha256_bytes(data) for data in updates.values()}
    releases = nights.entries("release")
    assert {entry["digest"] for entry in releases} <= digests
    charged = {(entry["run_id"], entry["round_index"], entry["attempt"]) for entry in nights.entries("charge")}
    released = [(entry["run_id"], entry["round_index"], entry["attempt"]) for entry in releases]
    assert len(released) == len(set(released))
    assert set(released) <= charged
    told = [
        json.loads(path.read_bytes())
        for path in nights.folder.glob("night-*/store/runs/*/rounds/*/clients/one/update.json")
    ]
    rested = {(entry["run_id"], entry["round_index"]) for entry in nights.entries("refusal")}
    finished = {(update["run_id"], update["round_index"]) for update in told}
    assert len(finished) == len(told)
    assert len(finished | rested) == NIGHTS * ROUNDS
    assert len(rested - finished) <= 2, "only the night that was killed again and again may run out of its share"
    for update in told:
        assert (update["run_id"], update["round_index"], update["attempt"]) in released
        assert update["update"]["sha256"] in digests
    # A retry that re-sent bytes costs nothing: one charge per attempt, never two for one set of bytes.
    assert len(charged) == len(nights.entries("charge"))


def test_failed_attempts_stay_charged(nights: Nights) -> None:
    retried = [entry for entry in nights.entries("charge") if entry["attempt"] > 0]
    nights_of_retries = {entry["run_id"] for entry in retried}
    for night in FAILING:
        run_id = json.loads((nights.folder / f"night-{night:02d}" / "study.json").read_text())["run_id"]
        assert run_id in nights_of_retries


def test_the_next_night_rests_or_stays_within_what_is_left(nights: Nights) -> None:
    before = sum(entry["rdp_charge"] for entry in nights.entries("charge"))
    code = nights.run(NIGHTS)
    after = sum(entry["rdp_charge"] for entry in nights.entries("charge"))
    budget = nights.entries("plan")[0]["rdp_budget"]
    assert after <= budget
    assert code in (0, RESTED)
    if code == RESTED:
        assert after == before
