"""What stands between a version and ``champion``: evidence that is missing, or speaks of something else, on real MLflow."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.errors import GateError
from fedmentor_core.lineage import Lineage
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.records import GateSummary
from fedmentor_core.storage.local import LocalStore
from tasks.registration_records import BackboneReference, DomainPromise, Registration
from tasks.registry import champion, decide, promote, register_and_decide, register_challenger
from tasks.registry_client import find_alias
from tasks.tracking import mlflow_client

NAME = "evidence-adapter"
PASSED = GateSummary(passed=True, reasons=())
ACCOUNT = PrivacyAccount.open(8.0, 1e-5, 0.25, 8)


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"lora_B": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def registration(tracker, study, lineage):
    def make(lineage: Lineage = lineage, **changes) -> Registration:
        fields = {
            "name": NAME,
            "study_run_id": "run-0",
            "mlflow_run_id": tracker.start_study_run(study.config, "run-0"),
            "config_sha256": "c" * 64,
            "private": True,
            "promises": DomainPromise.of(study.summary()),
            "backbone": BackboneReference(name="embedded", sha256="b" * 64, max_length=128),
            "mechanism": Mechanism(parts={"a": 1}),
            "lineage": lineage,
        }
        return Registration(**{**fields, **changes})

    return make


@pytest.fixture
def held(registration, tracking_uri, adapter, tags):
    """Registers, and returns why the version stays challenger; a promotion by hand must be refused for the same."""

    def why(given: Registration | None = None) -> str:
        model = register_and_decide(tracking_uri, given or registration(), adapter, PASSED)
        assert model.aliases == ("challenger",)
        with pytest.raises(GateError, match="cannot be promoted"):
            promote(tracking_uri, NAME, model.version, reason="please")
        assert champion(tracking_uri, NAME) is None
        return tags()["fedmentor.held"]

    return why


@pytest.fixture
def tags(tracking_uri):
    return lambda: dict(mlflow_client(tracking_uri).get_model_version(NAME, "1").tags)


@pytest.fixture
def promoted(registration, tracking_uri, adapter, tags):
    """A champion, and then what is refused when its evidence went stale: it could not be promoted again."""
    model = register_and_decide(tracking_uri, registration(), adapter, PASSED)
    assert model.aliases == ("challenger", "champion")

    def again() -> str:
        with pytest.raises(GateError) as caught:
            promote(tracking_uri, NAME, "1", reason="again")
        return str(caught.value)

    return again


def test_lineage_leads_both_ways(registration, lineage, tracking_uri, adapter, tags, ledgers):
    register_and_decide(tracking_uri, registration(), adapter, PASSED)
    found = tags()
    for head in lineage.heads:
        said = json.loads(found[f"fedmentor.ledger_head.{head.account}"])
        view = Ledger(ledgers, head.account).view()
        assert (said["sha256"], said["epsilon_spent"]) == (view.entries[-1]["sha256"], view.epsilon_spent)
    assert json.loads(found["fedmentor.manifests"]) == list(lineage.manifests)
    assert found["fedmentor.gate_manifest_sha256"] == lineage.gate_manifest
    assert found["fedmentor.gate_adapter_sha256"] == found["fedmentor.adapter_sha256"]
    assert found["fedmentor.git_revision"] == "unknown"
    assert found["fedmentor.started_from"] == "backbone"
    assert json.loads(found["fedmentor.scorers"])["bertscore"] == "x"
    assert found["fedmentor.dataset_fingerprint.sleep"].startswith("sleep")
    assert json.loads(found["fedmentor.ledger"])["url"] == ledgers.url
    assert found["fedmentor.epsilon_spent.sleep"] == "2.0"
    assert found["fedmentor.delta.sleep"] == "1e-05"


def test_a_ledger_that_grew_is_not_stale(promoted, ledgers, tracking_uri):
    Ledger(ledgers, "sleep").charge(
        ACCOUNT, run_id="run-1", round_index=0, attempt=0, dataset_fingerprint="f" * 64, noise_multiplier=2.0,
        sample_rate=0.25, steps=4,
    )  # fmt: skip
    assert promote(tracking_uri, NAME, "1", reason="again").aliases == ("challenger", "champion")


def test_no_ledger_no_champion(held, registration, lineage):
    assert "no ledger that paid for sleep, stress" in held(registration(lineage.model_copy(update={"heads": ()})))


def test_an_account_without_entries_pays_for_nothing(held, registration, lineage):
    empty = lineage.heads[0].model_copy(update={"sha256": "", "n_entries": 0})
    assert "no ledger that paid for stress" in held(
        registration(lineage.model_copy(update={"heads": (empty, lineage.heads[1])}))
    )


def test_an_account_at_a_site_pays_for_nothing_unless_the_site_named_its_entry(held, registration, lineage):
    at_site = lineage.heads[0].model_copy(update={"site": "site-a", "sha256": "", "n_entries": 0})
    heads = (at_site, lineage.heads[1])
    assert "no ledger that paid for stress" in held(registration(lineage.model_copy(update={"heads": heads})))


def test_an_account_at_a_site_pays_when_the_site_named_its_entry(registration, lineage, tracking_uri, adapter):
    at_site = lineage.heads[0].model_copy(update={"site": "site-a", "sha256": "5f" * 32, "n_entries": 0})
    given = registration(lineage.model_copy(update={"heads": (at_site, lineage.heads[1])}))
    assert "champion" in register_and_decide(tracking_uri, given, adapter, PASSED).aliases


def test_a_private_version_without_promises_is_refused(held, registration):
    assert "no ledger" in held(registration(promises=()))


def test_a_ledger_that_cannot_be_reached_is_no_evidence(promoted, ledgers):
    shutil.rmtree(ledgers.root)
    assert "no longer holds the entry" in promoted()


def test_a_broken_chain_is_stale(promoted, ledgers):
    entry = ledgers.root / "ledgers" / "sleep" / "00000001.json"
    entry.chmod(0o644)
    entry.write_bytes(entry.read_bytes().replace(b'"steps":4', b'"steps":3'))
    assert "ledger of 'sleep' is broken" in promoted()


def test_an_account_that_was_begun_anew_is_stale(promoted, ledgers):
    """As good a chain as any, and not the one that paid for this adapter."""
    shutil.rmtree(ledgers.root / "ledgers" / "sleep")
    shutil.rmtree(ledgers.root / "ledger-witnesses" / "sleep")
    Ledger(LocalStore(ledgers.root), "sleep").open_account(ACCOUNT, run_id="run-9", dataset_fingerprint="e" * 64)
    assert "'sleep' no longer holds the entry" in promoted()


def test_the_verdict_on_another_adapter_is_no_evidence(registration, tracking_uri, adapter, tags):
    model = register_challenger(tracking_uri, registration(), adapter)
    decide(tracking_uri, NAME, model.version, PASSED, judged_sha256="9" * 64)
    assert "judged adapter 999999999999" in tags()["fedmentor.held"]
    assert champion(tracking_uri, NAME) is None


def test_a_version_whose_verdict_names_no_adapter_is_refused(promoted, tracking_uri):
    """As versions of before were registered."""
    mlflow_client(tracking_uri).delete_model_version_tag(NAME, "1", "fedmentor.gate_adapter_sha256")
    assert "names no adapter" in promoted()


def test_a_version_without_a_verdict_is_refused(promoted, tracking_uri):
    mlflow_client(tracking_uri).delete_model_version_tag(NAME, "1", "gate")
    assert "its gate is 'missing'" in promoted()


def test_files_that_were_changed_in_the_registry_are_refused(promoted, tracking_uri):
    folder = Path(mlflow_client(tracking_uri).get_model_version_download_uri(NAME, "1").removeprefix("file://"))
    save_file({"lora_B": torch.zeros(2, 2)}, folder / "artifacts" / "adapter" / "adapter_model.safetensors")
    assert "were changed since it was registered" in promoted()


def test_a_recorded_audit_of_another_mechanism_is_refused(promoted, tracking_uri):
    client = mlflow_client(tracking_uri)
    client.set_model_version_tag(NAME, "1", "fedmentor.audit", "passed")
    client.set_model_version_tag(NAME, "1", "fedmentor.audit_mechanism_sha256", "9" * 64)
    assert "its audit is of another mechanism" in promoted()


def test_a_missing_audit_is_refused_where_one_is_asked_for(held, registration):
    assert "asks for an audit" in held(registration(audit_required=True))


def test_no_registered_model_has_no_alias(tracking_uri):
    assert find_alias(mlflow_client(tracking_uri), "nobody", "champion") is None


def test_a_verdict_against_another_champion_is_stale(registration, tracking_uri, adapter):
    """Two studies compared themselves with the same champion: the slower one must not replace the faster one unseen."""
    first = register_and_decide(tracking_uri, registration(rival="none"), adapter, PASSED)
    assert "champion" in first.aliases
    faster, slower = (
        register_challenger(tracking_uri, registration(rival=first.version, study_run_id=run_id), adapter)
        for run_id in ("run-1", "run-2")
    )
    made = [
        decide(tracking_uri, NAME, one.version, PASSED, judged_sha256=_digest(tracking_uri, one.version))
        for one in (faster, slower)
    ]
    assert "champion" in made[0].aliases
    assert "champion" not in made[1].aliases
    assert champion(tracking_uri, NAME).version == faster.version
    with pytest.raises(GateError, match=f"compared it with champion {first.version}, and champion now is"):
        promote(tracking_uri, NAME, slower.version, reason="please")
    assert promote(tracking_uri, NAME, faster.version, reason="again").version == faster.version


def _digest(tracking_uri: str, version: str) -> str:
    return mlflow_client(tracking_uri).get_model_version(NAME, version).tags["fedmentor.adapter_sha256"]
