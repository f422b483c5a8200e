"""A night over two sites as it is in production: a Prefect server, its worker, and a worker for each site.

The server is told no path of a site's data and may not read it. One site is killed in the middle of its training: the
round goes on with the other one, and the candidate, which nobody evaluated at the dead site, does not pass its gate.
"""

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from prefect_service import GROUPS, WALLED, PrefectService, until

from fedmentor_core.data import invented
from fedmentor_core.site.signing import make_key_file

MARK = "QZXJ-unmistakable-words"


def make_site(folder: Path, site: str, domain: str, corpus: str, store: str) -> tuple[Path, str]:
    """A site's folder: posts, policy, key, ledger and file; only its group may look into its data."""
    place = folder / site
    data = place / f"data-of-{site}"
    data.mkdir(parents=True)
    with (data / "posts.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "question", "answer"])
        for row in invented.generate(corpus, 90, 3):
            writer.writerow([f"{MARK} {row['post']}", row["question"], row["response"]])
    policy = {"domain": domain, "epsilon": 8.0, "validation_epsilon": 60.0}
    (place / "policy.yaml").write_text(yaml.safe_dump(policy))
    public_key = make_key_file(place / "site.key")
    columns = {"post": "text", "question": "question", "response": "answer"}
    described = {
        "site": site,
        "store": {"url": store},
        "ledger_url": (place / "ledger").as_uri(),
        "signing_key_file": "site.key",
        "domains": {
            domain: {
                "source": {"kind": "csv", "path": "posts.csv", "columns": columns},
                "data_root": data.name,
                "policy_file": "policy.yaml",
            }
        },
    }
    (place / "site.yaml").write_text(yaml.safe_dump(described))
    if WALLED:
        for path in (data, data / "posts.csv"):
            os.chown(path, 40000, GROUPS[site])
            path.chmod(0o750 if path.is_dir() else 0o640)
    return place, public_key


@pytest.mark.slow
def test_a_night_over_two_sites_survives_the_death_of_one(service, tmp_path, tiny_study):
    store = (tmp_path / "store").as_uri()
    corpora = [domain["source"]["corpus"] for domain in tiny_study["domains"]]
    place_a, key_a = make_site(tmp_path / "sites", "site-a", "one", corpora[0], store)
    place_b, key_b = make_site(tmp_path / "sites", "site-b", "two", corpora[1], store)
    study = tiny_study | {
        "name": "night-at-sites",
        "rounds": 1,
        "domains": [
            {"name": "one", "source": {"kind": "site"}, "site": "site-a", "epsilon": 8.0},
            {"name": "two", "source": {"kind": "site"}, "site": "site-b", "epsilon": 8.0},
        ],
        "sites": {
            name: {"public_key": key, "start_within_seconds": 15, "deadline_seconds": 600, "poll_seconds": 0.5}
            for name, key in (("site-a", key_a), ("site-b", key_b))
        },
        "training": tiny_study["training"] | {"steps_per_round": 40},
        "privacy": {"planned_runs": 3},
        "adaptation": {"rule": "fixed"},
        "evaluation": tiny_study["evaluation"]
        | {
            "gate_data": "private",
            "private": {"epsilon": 50.0},
            "thresholds": [{"metric": "safe_rate", "at_least": 0.5, "relative_to": "champion"}],
        },
        "execution": {"client_retries": 0},
        "storage": {"url": store},
        "tracking": {"enabled": True},
    }
    service.start_worker("site-a", FEDMENTOR_SITE_FILE=str(place_a / "site.yaml"))
    service.start_worker("site-b", FEDMENTOR_SITE_FILE=str(place_b / "site.yaml"))
    try:
        out = tmp_path / "out"
        night = service.start_deployment("nightly-retraining/nightly", config=study, out_dir=str(out))
        if WALLED:
            for name in ("server", "site-b"):
                assert "PermissionError" in look_into(service, name, place_a / "data-of-site-a")
            assert look_into(service, "site-a", place_a / "data-of-site-a") == ""
        until(lambda: charged(place_b), 600, "site-b's training")
        service.kill("site-b", children_only=True)
        crashed = until(lambda: service.runs_of("client-site", "CRASHED"), 120, "the crash", every=1.0)
        assert crashed[0].startswith("train two for night-at-sites-")
        service.kill("site-b")
        assert service.ended(night) == "COMPLETED", service.log("server")
    finally:
        for name in ("site-a", "site-b"):
            if name in service.started:
                service.kill(name)

    (left,) = out.glob("*/night.json")
    report = json.loads(left.read_text())
    assert (report["outcome"], report["champion_before"]) == ("held", None)
    assert report["model"]["aliases"] == ["challenger"]
    summary = json.loads((left.parent / "summary.json").read_text())
    clients = {client["domain"]: client for client in summary["rounds"][0]["clients"]}
    assert clients["one"]["status"] == "trained"
    assert clients["two"]["status"] == "failed"
    assert "site-b" in clients["two"]["reason"]
    assert clients["two"]["epsilon_spent"] > 0, "a charge that may stand is counted"
    assert any("'two' was not evaluated" in reason for reason in summary["rounds"][0]["gate"]["reasons"])
    assert set(summary["final"]["by_domain"]) == {"one"}

    withdrawn = service.runs_of("client-site", "CANCELLED")
    assert len(withdrawn) == 2
    assert all(name.startswith("evaluate two") for name in withdrawn)
    kept_apart(service, tmp_path, (place_a, place_b))


def kept_apart(service: PrefectService, folder: Path, places: tuple[Path, ...]) -> None:
    """No post and no path of a site is in anything that the server holds: store, outputs, Prefect's database, logs."""
    homes = service.folder / "homes"
    held = [folder / "store", folder / "out", homes / "prefect", homes / "server"]
    files = [path for place in held for path in place.rglob("*") if path.is_file()]
    files += [service.folder / "prefect.log", service.folder / "server.log"]
    assert any(path.name.startswith("train-") for path in files), "the answers are among what is searched"
    private = [MARK.encode(), *(str(place).encode() for place in places), b"data-of-site"]
    for path in files:
        content = path.read_bytes()
        assert not [text for text in private if text in content], path


def look_into(service: PrefectService, name: str, folder: Path) -> str:
    """What stops a process like that one from listing a folder."""
    line = service.command(name, "-c", f"import os; os.listdir({str(folder)!r})")
    return subprocess.run(line, env=service.environment(name), capture_output=True, text=True, check=False).stderr


def charged(place: Path) -> bool:
    """Whether a site's ledger holds a charge for training."""
    return any('"charge"' in path.read_text() for path in (place / "ledger" / "ledgers" / "two").glob("*.json"))
