"""SIGKILL before every write of the server's part of a study, each start killed one write further than the last.

The server's part charges nothing: whatever dies there, the study ends with the adapters, the accounts and the outputs
of one that was left alone.
"""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.storage.local import LocalStore

SERVER_SIDE = r"^(?!store/ledger|.*/clients/|study\.json|store/\.fedmentor)"
"""Everything but the clients' updates and the ledgers, which ``test_thirty_nights.py`` kills at."""
ROUNDS = 2


class Starts:
    """Starts of studies in processes of their own."""

    def __init__(self, *options: str) -> None:
        driver = [sys.executable, str(Path(__file__).with_name("server_side.py")), *options]
        self._driver = subprocess.Popen(driver, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, config: dict[str, Any], out: Path, **more: Any) -> int:
        """Exit code, or minus the signal."""
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(json.dumps({"config": config, "out": str(out), **more}) + "\n")
        self._driver.stdin.flush()
        return int(self._driver.stdout.readline())

    def close(self) -> None:
        self._driver.communicate()


@pytest.fixture(scope="module")
def starts() -> Iterator[Starts]:
    started = Starts()
    yield started
    started.close()


@pytest.fixture(scope="module")
def study(tiny_backbone_folder: Path) -> dict[str, Any]:
    """Two clients, two rounds, seeded noise, so that adapters can be compared; charged like any other."""
    return {
        "name": "tiny",
        "seed": 3,
        "rounds": ROUNDS,
        "backbone": {"name": str(tiny_backbone_folder), "max_length": 160},
        "adapter": {"rank": 2, "alpha": 4.0},
        "domains": [
            {"name": name, "source": {"kind": "invented", "corpus": corpus, "n_units": 60}, "epsilon": 8.0}
            for name, corpus in (("one", "peer_forum"), ("two", "student_inbox"))
        ],
        "privacy": {"noise_seed": 11},
        "training": {"steps_per_round": 1, "batch_size": 8, "microbatch_size": 8, "max_target_tokens": 32},
        "adaptation": {"rule": "paper", "threshold": 0.9},
        "evaluation": {
            "gate_data": "public",
            "max_gate_examples": 2,
            "max_test_examples": 2,
            "max_new_tokens": 4,
            "thresholds": [{"metric": "toxicity_mean", "at_most": 1.0}],
        },
        "tracking": {"enabled": False},
    }


@pytest.fixture(scope="module")
def undisturbed(starts: Starts, study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert starts.run(study, out) == 0
    return out


@pytest.fixture(scope="module")
def killed(starts: Starts, study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose every start died before its second new write (the first start: before its first)."""
    out = tmp_path_factory.mktemp("killed") / "out"
    for number in range(60):
        code = starts.run(study, out, at=SERVER_SIDE, nth=2 if number else 1)
        if code == 0:
            return out
        assert code == -signal.SIGKILL, f"start {number} ended with {code}"
    pytest.fail("a study has more writes than expected")


def deaths(out: Path) -> list[str]:
    return (out.parent / f"{out.name}.died-before").read_text().splitlines()


def store(out: Path) -> LocalStore:
    return LocalStore(out / "store")


def run_id(out: Path) -> str:
    return str(json.loads((out / "study.json").read_text())["run_id"])


def charges(out: Path) -> list[dict[str, Any]]:
    kept = {
        "kind",
        "round_index",
        "attempt",
        "noise_multiplier",
        "sample_rate",
        "steps",
        "rdp_charge",
        "epsilon_budget",
    }
    return [
        {"domain": name, **entry.model_dump(include=kept)}
        for name in ("one", "two")
        for entry in Ledger(store(out), name).entries()
    ]


def manifests(out: Path) -> list[dict[str, Any]]:
    return [store(out).get_json(f"runs/{run_id(out)}/rounds/{index:04d}/manifest.json") for index in range(ROUNDS)]


@pytest.mark.slow
def test_it_died_before_each_of_its_writes(killed: Path, undisturbed: Path) -> None:
    def kinds(paths: list[str]) -> Counter[str]:
        return Counter(re.sub(r"[0-9a-f]{24,}", "DIGEST", path.replace(run_id(killed), "RUN")) for path in paths)

    written = [path.relative_to(undisturbed).as_posix() for path in undisturbed.rglob("*") if path.is_file()]
    written = [path.replace(run_id(undisturbed), run_id(killed)) for path in written if re.search(SERVER_SIDE, path)]
    assert kinds(deaths(killed)) == kinds(written)
    assert {"report.html", "config.yaml", "summary.json"} <= set(deaths(killed))
    died_at = kinds(deaths(killed))
    assert died_at["store/runs/RUN/adapters/DIGEST.safetensors"] == 2 + ROUNDS, "two to begin with, one a round"
    assert died_at["store/runs/RUN/rounds/0001/manifest.json"] == 1
    assert died_at["store/runs/RUN/evaluations/DIGEST/gate-two.json"] == 1 + ROUNDS


@pytest.mark.slow
def test_it_ends_with_the_same_adapters_and_decisions(killed: Path, undisturbed: Path) -> None:
    for found, expected in zip(manifests(killed), manifests(undisturbed), strict=True):
        assert found["adapter"]["sha256"] == expected["adapter"]["sha256"]
        assert (found["next_noise"], found["rounds_below"]) == (expected["next_noise"], expected["rounds_below"])
        assert found["summary"]["metrics"] == expected["summary"]["metrics"]
    assert manifests(killed)[1]["adapter"] != manifests(killed)[0]["adapter"]


@pytest.mark.slow
def test_it_ends_with_the_same_accounts(killed: Path, undisturbed: Path) -> None:
    assert charges(killed) == charges(undisturbed)
    assert [entry["kind"] for entry in charges(killed) if entry["domain"] == "two"] == ["plan"] + ROUNDS * [
        "charge", "release",
    ]  # fmt: skip
    for name in ("one", "two"):
        view, expected = (Ledger(store(out), name).view() for out in (killed, undisturbed))
        assert view.epsilon_spent == expected.epsilon_spent
        assert 0 < view.epsilon_spent <= view.epsilon_budget


@pytest.mark.slow
def test_it_leaves_the_same_outputs_and_nothing_half_written(killed: Path, undisturbed: Path) -> None:
    def comparable(out: Path) -> Any:
        summary = json.loads((out / "summary.json").read_text())
        return json.loads(
            json.dumps({key: value for key, value in summary.items() if key not in ("run_id", "store_url")}),
            object_hook=lambda found: {  # a ledger entry holds the time it was made
                key: value for key, value in found.items() if not key.startswith(("seconds", "ledger_entry"))
            },
        )

    assert comparable(killed) == comparable(undisturbed)
    assert (killed / "report.html").read_text().rstrip().endswith("</html>")
    folders = [path.relative_to(killed).as_posix() for path in killed.rglob("*") if path.is_file()]
    left = [path for path in folders if not path.startswith(("store/runs/", "store/ledger", "store/.fedmentor/"))]
    assert {name for name in left if not name.startswith(".")} == {
        "study.json", "summary.json", "report.html", "config.yaml",
    }  # fmt: skip
