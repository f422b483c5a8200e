"""An audit as a gate before promotion, and the promises that a registered version carries; on the real MLflow."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmentor_core.audit import membership, run
from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.audit.run import run_audit
from fedmentor_core.audit.verdict import FinishedAudit, read_audit, write_audit
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError, GateError, OutputExistsError
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.records import GateSummary
from fedmentor_core.study_ref import open_study
from flows.promote import promote as promote_flow
from flows.promote import promote_command
from tasks.auditing import audit_is_due, audit_study, objections
from tasks.registration_records import BackboneReference, DomainPromise, Registration, description_of, promise_tags
from tasks.registry import champion, register_and_decide
from tasks.tracking import mlflow_client

NAME = "audited-adapter"
PASSED = GateSummary(passed=True, reasons=())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The probes have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "N_BOOTSTRAP", 20)
        patch.setattr(run, "run_probes", lambda *given: [])
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture
def audited(tiny_study):
    """A configuration of the two domains that ``study`` has."""
    for domain, name in zip(tiny_study["domains"], ("stress", "sleep"), strict=True):
        domain["name"] = name
    tiny_study["audit"] = {"before_promotion": True, "canaries": 12}
    return validate_config(tiny_study)


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    """Folder of one finished real audit, kept for the module."""
    return tmp_path_factory.mktemp("audits")


@pytest.fixture
def passed(audited, audits) -> Path:
    folder = audits / "passed"
    if not folder.exists():
        write_audit(run_audit(audited, folder, units={"stress": 40, "sleep": 40}), folder)
    return folder


@pytest.fixture
def failed(passed, audits) -> Path:
    """The same audit with one failed check."""
    return rewritten(passed, audits / "failed.json", passed=False, reasons=("stress: noise: none was found",))


def rewritten(folder: Path, target: Path, **changes) -> Path:
    report = read_audit(folder).report
    target.write_text(report.model_copy(update=changes).model_dump_json(), encoding="utf-8")
    return target


@pytest.fixture
def register(tracker, study, audited, passed, lineage, tmp_path):
    """Registers a version that ``passed`` speaks for, unless told otherwise."""

    def go(number: int = 0, *, mechanism: Mechanism | None = None, required: bool = False, audit: Path | None = None):
        folder = tmp_path / f"adapter{number}"
        folder.mkdir(exist_ok=True)
        save_file({"lora_B": torch.full((2, 2), float(number))}, folder / "adapter_model.safetensors")
        registration = Registration(
            name=NAME,
            study_run_id=f"run-{number}",
            mlflow_run_id=tracker.start_study_run(study.config, f"run-{number}"),
            config_sha256="c" * 64,
            private=True,
            promises=DomainPromise.of(study.summary()),
            backbone=BackboneReference(name="embedded", sha256="b" * 64, max_length=128),
            mechanism=mechanism or read_audit(passed).report.mechanism,
            lineage=lineage,
            audit_required=required,
        )
        given = None if audit is None else read_audit(audit)
        return register_and_decide(tracker.tracking_uri, registration, folder, PASSED, audit=given)

    return go


@pytest.fixture
def tags(tracker):
    return lambda version="1": dict(mlflow_client(tracker.tracking_uri).get_model_version(NAME, version).tags)


# --- promotion by hand ------------------------------------------------------------------------------------------------


def test_a_passed_audit_lets_a_version_be_promoted_and_is_recorded(register, tags, tracking_uri, passed):
    assert register(required=True).aliases == ("challenger",)
    assert "asks for an audit" in tags()["fedmentor.held"]
    with pytest.raises(GateError, match="asks for an audit"):
        promote_command(tracking_uri, NAME, "1")
    assert "champion" in promote_command(tracking_uri, NAME, "1", audit=passed).aliases
    audit = read_audit(passed)
    found = tags()
    assert found["fedmentor.audit"] == "passed"
    assert found["fedmentor.audit_sha256"] == audit.sha256 == sha256_bytes((passed / "audit.json").read_bytes())
    assert float(found["fedmentor.audit_epsilon_claimed"]) == audit.report.epsilon_claimed
    assert float(found["fedmentor.audit_epsilon_lower_bound"]) == audit.report.epsilon_lower_bound
    assert float(found["fedmentor.audit_auc"]) == audit.report.mia_auc
    assert float(found["fedmentor.audit_confidence"]) == audit.report.confidence
    assert "fedmentor.held" not in found, "it is held no longer"


def test_a_failed_audit_is_recorded_and_refuses(register, tags, tracking_uri, failed, passed):
    register(required=True)
    for audit in (failed, None):
        with pytest.raises(GateError, match=r"its audit failed .*none was found"):
            promote_command(tracking_uri, NAME, "1", audit=audit)
    assert champion(tracking_uri, NAME) is None
    assert tags()["fedmentor.audit"] == "failed"
    promote_flow.fn("1", "reviewed", NAME, tracking_uri, audit=str(passed))
    assert tags()["fedmentor.audit_failed_before"] == read_audit(failed).sha256, "a pass does not hide the failure"


@pytest.mark.parametrize(
    ("part", "value"), [("training.batch_size", 9), ("backbone.sha256", "f" * 64), ("fedmentor", "0.0.0")]
)
def test_an_audit_of_another_mechanism_is_refused_by_name(register, tags, tracking_uri, passed, part, value):
    mine = read_audit(passed).report.mechanism
    register(mechanism=Mechanism(parts={**mine.parts, part: value}))
    promote_command(tracking_uri, NAME, "1")
    register(1, mechanism=Mechanism(parts={**mine.parts, part: value}), required=True)
    before = tags("2")
    with pytest.raises(GateError, match=f"another mechanism.*{part}: {mine.parts[part]} / {value}"):
        promote_command(tracking_uri, NAME, "2", audit=passed)
    assert tags("2") == before
    assert champion(tracking_uri, NAME).version == "1"


def test_an_audit_of_fewer_domains_or_a_changed_report_is_refused(register, tracking_uri, passed, tmp_path):
    register(required=True)
    report = read_audit(passed).report
    one = rewritten(passed, tmp_path / "one.json", domains=report.domains[:1])
    with pytest.raises(GateError, match="no canaries in sleep"):
        promote_command(tracking_uri, NAME, "1", audit=one)
    other = Mechanism(parts={**report.mechanism.parts, "rounds": 99})
    with pytest.raises(ConfigError, match="changed"):
        promote_command(tracking_uri, NAME, "1", audit=rewritten(passed, tmp_path / "x.json", mechanism=other))
    (tmp_path / "old.json").write_text('{"passed": true}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not an audit report"):
        promote_command(tracking_uri, NAME, "1", audit=tmp_path / "old.json")
    with pytest.raises(ConfigError, match="no finished audit"):
        promote_command(tracking_uri, NAME, "1", audit=tmp_path)
    assert champion(tracking_uri, NAME) is None


# --- before promotion ---------------------------------------------------------------------------------------------------


def test_the_studys_own_audit_decides(register, tags, tracking_uri, passed, failed):
    held = register(0, required=True, audit=failed)
    assert held.aliases == ("challenger",)
    assert "none was found" in tags()["fedmentor.held"]
    assert register(1, required=True, audit=passed).aliases == ("challenger", "champion")
    assert register(1, required=True, audit=passed).version == "2", "a resume finds it"


def test_audit_task_uses_the_public_numbers_and_is_kept(audited, tmp_path, monkeypatch):
    ref = open_study(audited, tmp_path / "out")
    half = tmp_path / "out" / "audit"
    half.mkdir()
    (half / "study.json").write_text(json.dumps({"study": "tiny-audit"}), encoding="utf-8")
    (half / "coins").write_text("of an audit that was cut short", encoding="utf-8")
    made = audit_study.fn(ref)
    assert made.report.passed, made.report.reasons
    assert not (half / "coins").exists()
    assert made == read_audit(half) == audit_study.fn(ref), "a finished audit is not thrown again"
    assert made.report.data == "invented"
    assert objections(made) == ()

    verdict = made.report.model_copy(update={"passed": False, "reasons": ("one: noise: none",)})
    told = objections(FinishedAudit(report=verdict, sha256=made.sha256))
    assert told == ("the audit before promotion failed (audit/audit.json in the output folder): one: noise: none",)


def test_audit_folder_of_something_else_is_left_alone(audited, passed, tmp_path):
    ref = open_study(audited, tmp_path / "out")
    folder = tmp_path / "out" / "audit"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="none of ours"):
        audit_study.fn(ref)
    assert (folder / "notes.txt").read_text() == "mine"

    shutil.rmtree(folder)
    folder.mkdir()
    report = read_audit(passed).report
    other = Mechanism(parts={**report.mechanism.parts, "rounds": 99})
    rewritten(passed, folder / "audit.json", mechanism=other, mechanism_sha256=other.sha256)
    with pytest.raises(OutputExistsError, match="rounds: 99 / 2"):
        audit_study.fn(ref)


def test_an_audit_is_due_only_where_it_would_decide(audited, study, tmp_path):
    ref = open_study(audited, tmp_path / "out")
    summary = study.summary()
    assert audit_is_due(ref, summary)
    assert not audit_is_due(ref, summary.model_copy(update={"status": "held"}))
    assert not audit_is_due(ref, summary.model_copy(update={"private": False}))
    unasked = ref.model_copy(update={"config": audited.model_copy(update={"audit": type(audited.audit)()})})
    assert not audit_is_due(unasked, summary)


def test_an_audit_of_client_level_privacy_is_refused_when_the_study_is_read(tiny_study):
    tiny_study["audit"] = {"before_promotion": True}
    tiny_study["privacy"] = {"level": "client"}
    with pytest.raises(ConfigError, match=r"audit\.before_promotion"):
        validate_config(tiny_study)


# --- promises -----------------------------------------------------------------------------------------------------------


def test_ten_domains_promises_are_in_tags_and_description(tracker, study, audited, lineage, tmp_path):
    client, plan = study.client("sleep", 0), study.plan().domains[0]
    names = [f"clinic-{number}-of-a-long-federation-name-{number:02d}" for number in range(10)]
    summary = study.summary().model_copy(
        update={
            "plan": study.plan().model_copy(
                update={
                    "domains": tuple(
                        plan.model_copy(update={"domain": name, "sensitivity": "high", "privacy_unit": "patient"})
                        for name in names
                    )
                }
            ),
            "rounds": tuple(
                study.round(index).model_copy(
                    update={
                        "clients": tuple(
                            client.model_copy(
                                update={
                                    "domain": name,
                                    "noise_multiplier": 1.5 - 0.25 * index,
                                    "epsilon_spent": 1.0 + number + index,
                                    "status": "rested" if number == 9 else "trained",
                                }
                            )
                            for number, name in enumerate(names)
                        )
                    }
                )
                for index in range(2)
            ),
        }
    )
    registration = Registration(
        name=NAME,
        study_run_id="run-0",
        mlflow_run_id=tracker.start_study_run(study.config, "run-0"),
        config_sha256="c" * 64,
        private=True,
        promises=DomainPromise.of(summary),
        backbone=BackboneReference(name="embedded", sha256="b" * 64, max_length=128),
        mechanism=Mechanism.of(audited, "b" * 64),
        lineage=lineage,
    )
    (tmp_path / "adapter").mkdir()
    save_file({"lora_B": torch.ones(2, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    register_and_decide(tracker.tracking_uri, registration, tmp_path / "adapter", PASSED)

    version = mlflow_client(tracker.tracking_uri).get_model_version(NAME, "1")
    for number, name in enumerate(names):
        assert json.loads(version.tags[f"fedmentor.promise.{name}"]) == {
            "domain": name,
            "epsilon_spent": 2.0 + number,
            "epsilon_budget": 8.0,
            "delta": 1e-5,
            "sensitivity": "high",
            "privacy_level": "unit",
            "privacy_unit": "patient",
            "clip_norm": 1.0,
            "noise_multiplier_first": None if number == 9 else 1.5,
            "noise_multiplier_last": None if number == 9 else 1.25,
            "dataset_fingerprint": plan.dataset_fingerprint,
        }
        assert version.tags[f"fedmentor.epsilon_spent.{name}"] == repr(2.0 + number)
        assert f"| {name} | {2 + number} | 8 | 1e-05 | one patient | high | 1 | " in version.description
    assert version.tags["fedmentor.private"] == "true"
    assert version.tags["gate"] == "passed"
    assert version.tags["fedmentor.mechanism_sha256"] == registration.mechanism.sha256
    assert Mechanism.model_validate_json(version.tags["fedmentor.mechanism"]) == registration.mechanism
    assert plan.dataset_fingerprint in summary.plan.model_dump_json(), "public already: it is in summary.json"


def test_hundreds_of_domains_stay_within_what_mlflow_holds(study, audited, lineage):
    one = DomainPromise.of(study.summary())[0]
    promises = tuple(one.model_copy(update={"domain": f"d{number:03d}"}) for number in range(400))
    parts = {f"domains.d{number:03d}.some_setting_{n}": 0.5 for number in range(400) for n in range(10)}
    registration = Registration(
        name=NAME, study_run_id="r", mlflow_run_id="m", config_sha256="c" * 64, private=False, promises=promises,
        backbone=BackboneReference(name="embedded", sha256="b" * 64, max_length=128), mechanism=Mechanism(parts=parts),
        lineage=lineage,
    )  # fmt: skip
    text = description_of(registration)
    assert len(text) <= 5_000
    assert "more domains: see the tags" in text
    assert "NOT PRIVATE" in text
    found = promise_tags(registration)
    assert len([name for name in found if name.startswith("fedmentor.promise.")]) == 400
    assert max(len(value) for value in found.values()) <= 100_000
    assert found["fedmentor.mechanism_sha256"] == registration.mechanism.sha256
