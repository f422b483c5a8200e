"""``audit.before_promotion`` in a real Prefect run: the audit stands between the gate and ``champion``."""

import pytest
import torch

from fedmentor_core.audit import membership, run
from fedmentor_core.audit.probes import AuditCheck
from fedmentor_core.audit.verdict import read_audit
from fedmentor_core.config_io import validate_config
from tasks.tracking import mlflow_client

REASON = "the noise is not there"


@pytest.fixture(scope="module")
def prefect_server():
    """A throw-away Prefect server and database."""
    from prefect_harness import throwaway_prefect

    with throwaway_prefect():
        yield


@pytest.fixture
def audited(tiny_study, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(membership, "N_BOOTSTRAP", 20)
    monkeypatch.setattr(run, "run_probes", lambda *given: [])
    before = torch.get_num_threads()
    tiny_study["rounds"] = 1
    tiny_study["domains"] = tiny_study["domains"][:1]
    tiny_study["audit"] = {"before_promotion": True, "canaries": 12}
    tiny_study["tracking"] = {"enabled": True}
    yield validate_config(tiny_study)
    torch.set_num_threads(before)


@pytest.mark.slow
def test_champion_moves_only_after_a_passed_audit(audited, tmp_path, prefect_server, monkeypatch):
    from flows.federated_training import federated_training

    out = tmp_path / "good"
    summary = federated_training(audited, str(out))
    assert summary.status == "promoted"
    assert "champion" in summary.model.aliases
    audit = read_audit(out / "audit")
    found = tags(summary)
    assert (found["fedmentor.audit"], found["fedmentor.audit_sha256"]) == ("passed", audit.sha256)
    assert found["fedmentor.mechanism_sha256"] == audit.report.mechanism_sha256
    assert audit.report.domains[0].n_units == summary.plan.domains[0].n_units

    def fails(*given):
        return [AuditCheck(name="noise", passed=False, detail=REASON)]

    monkeypatch.setattr(run, "run_probes", fails)
    out = tmp_path / "bad"
    held = federated_training(audited, str(out))
    assert (held.status, held.model.aliases) == ("held", ("challenger",))
    assert any(REASON in warning for warning in held.warnings)
    assert tags(held)["gate"] == "passed"
    assert tags(held)["fedmentor.audit"] == "failed"
    assert REASON in tags(held)["fedmentor.held"]

    monkeypatch.setattr(run, "run_probes", lambda *given: pytest.fail("a finished audit is not thrown again"))
    again = federated_training(audited, str(out))
    assert (again.status, again.model.version) == ("held", held.model.version)


def tags(summary) -> dict[str, str]:
    client = mlflow_client(summary.tracking_uri)
    return dict(client.get_model_version(summary.model.name, summary.model.version).tags)
