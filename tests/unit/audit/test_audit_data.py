"""What an audit trains on and who pays: invented text and nobody, or the domains' own and their lifetime accounts."""

import json

import pytest
import torch

from fedmentor_core.audit import membership, run
from fedmentor_core.audit.standin import standin_config
from fedmentor_core.audit.verdict import write_audit
from fedmentor_core.config import StudyConfig
from fedmentor_core.data import invented
from fedmentor_core.errors import BudgetError, ConfigError
from fedmentor_core.privacy.ledger import Ledger, ledger_domains
from fedmentor_core.storage.base import open_store
from fedmentor_core.study_ref import find_study
from fedmentor_core.workspace import Workspace

MARKER = "zyxomarker"
N_CANARIES = 16


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The probes have tests of their own, and no probe looks at a domain's data."""
    monkeypatch.setattr(membership, "N_BOOTSTRAP", 20)
    monkeypatch.setattr(run, "run_probes", lambda *given: [])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def real_study(tiny_study, tmp_path) -> dict:
    """One domain from a table whose every post and answer holds a marker; gate and test sets are private too."""
    rows = invented.generate("student_inbox", 80, 11)
    table = tmp_path / "site" / "posts.jsonl"
    table.parent.mkdir()
    table.write_text(
        "".join(
            json.dumps({"text": f"{MARKER} {row['post']}", "answer": f"{row['response']} {MARKER}"}) + "\n"
            for row in rows
        ),
        encoding="utf-8",
    )
    columns = {"post": "text", "response": "answer", "question_text": "Is the student keeping up?"}
    tiny_study["domains"] = [
        {"name": "one", "source": {"kind": "jsonl", "path": str(table), "columns": columns}, "epsilon": 8.0}
    ]
    tiny_study["evaluation"] |= {"gate_data": "private"}
    return tiny_study


def all_bytes(folder) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_by_default_no_real_post_is_trained_on_or_written(real_study, tmp_path):
    lifetime = tmp_path / "lifetime"
    real_study["privacy"] = {"ledger_url": lifetime.as_uri()}
    study = StudyConfig.model_validate(real_study)
    real = Workspace(find_study(study, tmp_path / "study"))
    assert MARKER in real.data["one"].train["post"][0], "the marker would be seen"

    report = run.run_audit(study, tmp_path / "audit", n_canaries=N_CANARIES)
    write_audit(report, tmp_path / "audit")
    assert report.passed, report.reasons
    assert report.data == "invented"
    assert "nobody's text" in report.cost
    assert MARKER.encode() not in all_bytes(tmp_path / "audit")
    assert str(tmp_path / "site").encode() not in all_bytes(tmp_path / "audit")
    assert not lifetime.exists(), "no account was opened or charged"

    audited = run._prepare(study, tmp_path / "again", None, N_CANARIES)
    tokenizer = audited.backbone.tokenizer
    trained_on = [tokenizer.decode(ids) for ids in audited.training_set("one").input_ids]
    assert trained_on
    assert not any(MARKER in text for text in trained_on)
    assert any(MARKER in tokenizer.decode(ids) for ids in real.training_set("one").input_ids), "decoding shows it"


def test_the_audited_schedule_is_exactly_the_studys(real_study, tmp_path):
    study = StudyConfig.model_validate(real_study)
    promised = Workspace(find_study(study, tmp_path / "study")).make_plan().domains[0]
    audited = run._prepare(study, tmp_path / "audit", None, N_CANARIES).make_plan().domains[0]
    same = (
        "n_units", "sample_rate", "steps_per_round", "rounds", "noise_multiplier", "clip_norm", "delta", "rdp_order",
        "epsilon_budget", "epsilon_planned_rdp",
    )  # fmt: skip
    assert {name: getattr(audited, name) for name in same} == {name: getattr(promised, name) for name in same}
    assert audited.dataset_fingerprint != promised.dataset_fingerprint
    assert audited.validation == (), "an audit evaluates nothing, so it plans no validation account"


def test_with_a_number_of_units_no_data_is_needed(real_study, tmp_path):
    real_study["domains"][0]["source"]["path"] = str(tmp_path / "not-on-this-machine.jsonl")
    study = StudyConfig.model_validate(real_study)
    workspace = run._prepare(study, tmp_path / "audit", None, N_CANARIES, units={"one": 50})
    data = workspace.training_set("one")
    assert data.n_units == 50
    assert {len(data.rows_of_unit[unit]) for unit in range(50 - N_CANARIES)} == {2}, "rows of a unit are clipped as one"


def test_domains_that_are_not_audited_are_invented_too(tiny_study, tmp_path):
    study = StudyConfig.model_validate(tiny_study)
    workspace = run._prepare(study, tmp_path / "audit", "two", N_CANARIES, units={"one": 41, "two": 37})
    assert set(workspace.canaries) == {"two"}
    assert {name: workspace.training_set(name).n_units for name in ("one", "two")} == {"one": 41, "two": 37}
    units = [set(workspace.data[name].train["unit_id"]) for name in ("one", "two")]
    assert not units[0] & units[1]


def test_canaries_of_two_domains_are_units_of_their_own(tiny_study, tmp_path):
    study = StudyConfig.model_validate(tiny_study)
    workspace = run._prepare(study, tmp_path / "audit", None, N_CANARIES)
    one, two = (set(workspace.data[name].train["unit_id"]) for name in ("one", "two"))
    assert not one & two


def test_a_small_domain_gets_as_many_canaries_as_fit(tiny_study, tmp_path):
    tiny_study["domains"] = tiny_study["domains"][:1]
    tiny_study["training"]["batch_size"] = 4
    study = StudyConfig.model_validate(tiny_study)
    report = run.run_audit(study, tmp_path / "audit", n_canaries=200, units={"one": 19})
    assert report.n_canaries == 16
    assert report.domains[0].n_units == 19
    assert any("16 canaries rather than 200" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("units", "words"),
    [({"one": 500}, "one number for each of one, two"), ({"one": 500, "two": 10}, "two has 10"), ({}, "no domain")],
)
def test_units_that_do_not_fit_are_refused(tiny_study, tmp_path, units, words):
    with pytest.raises(ConfigError, match=words):
        run.run_audit(StudyConfig.model_validate(tiny_study), tmp_path / "audit", units=units)
    assert not (tmp_path / "audit").exists()


def test_the_stand_in_names_nothing_of_the_domains(real_study, tmp_path):
    real_study["privacy"] = {"ledger_url": (tmp_path / "lifetime").as_uri(), "max_composed_epsilon": 9.0}
    real_study["domains"][0]["shares_posts_with"] = ["elsewhere"]
    real_study["storage"] = {"url": (tmp_path / "store").as_uri()}
    real_study["data"] = {"root": str(tmp_path / "site")}
    made = standin_config(StudyConfig.model_validate(real_study), {"one": 40})
    text = made.model_dump_json()
    assert str(tmp_path) not in text.replace(str(made.backbone.name), "")
    assert "elsewhere" not in text


# --- with the domains' own data ------------------------------------------------------------------------------------


def test_own_data_is_charged_to_the_lifetime_account(real_study, tmp_path):
    lifetime = tmp_path / "lifetime"
    real_study["privacy"] = {"ledger_url": lifetime.as_uri(), "planned_runs": 2}
    study = StudyConfig.model_validate(real_study)
    planned = Workspace(find_study(study, tmp_path / "study")).make_plan().domains[0]
    report = run.run_audit(study, tmp_path / "audit", n_canaries=N_CANARIES, own_data=True)
    assert report.passed, report.reasons
    assert report.data == "own"
    assert "charged" in report.cost

    store = open_store(lifetime.as_uri())
    assert list(ledger_domains(store)) == ["one"], "no validation account was opened"
    view = Ledger(store, "one").view()
    assert view.epsilon_spent == pytest.approx(report.epsilon_claimed)
    charges = [entry for entry in view.entries if entry["kind"] == "charge"]
    assert len(charges) == study.rounds
    assert {entry["run_id"] for entry in charges} == {report.run_id}
    assert {entry["dataset_fingerprint"] for entry in charges} == {planned.dataset_fingerprint}, (
        "people's, not canaries'"
    )
    assert report.domains[0].n_units == planned.n_units + N_CANARIES
    assert not list((tmp_path / "audit").rglob("ledgers")), "the charge is in one place"

    second = run.run_audit(study, tmp_path / "audit2", n_canaries=N_CANARIES, own_data=True)
    assert second.passed, second.reasons
    both = Ledger(store, "one").view().epsilon_spent
    assert second.epsilon_claimed < both, "each audit claims what it was charged itself"
    assert both > view.epsilon_spent


def test_own_data_is_refused_when_the_budget_does_not_carry_it(real_study, tmp_path):
    real_study["privacy"] = {"ledger_url": (tmp_path / "lifetime").as_uri()}
    study = StudyConfig.model_validate(real_study)

    def audit(number: int) -> bytes:
        """One more audit; what the accounts hold after it."""
        run.run_audit(study, tmp_path / f"audit{number}", n_canaries=N_CANARIES, own_data=True)
        return all_bytes(tmp_path / "lifetime")

    charged = audit(0)
    with pytest.raises(BudgetError, match="'one'") as refusal:  # noqa: PT012 - the first few may still fit
        for number in range(1, 4):
            charged = audit(number)
    assert refusal.value.exit_code == 3
    assert all_bytes(tmp_path / "lifetime") == charged, "a refused audit charges nothing"
    assert not (tmp_path / f"audit{number}").exists()


def test_own_data_needs_a_lifetime_account(real_study, tmp_path):
    study = StudyConfig.model_validate(real_study)
    with pytest.raises(ConfigError, match=r"privacy\.ledger_url is not set"):
        run.run_audit(study, tmp_path / "audit", own_data=True)
    assert not (tmp_path / "audit").exists()
