"""The audit passes on the production path and fails on every sabotage of it."""

import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer

from fedmentor_core import client_round
from fedmentor_core.audit import membership, probes, run
from fedmentor_core.audit.attack import gradient_scores
from fedmentor_core.audit.bound import best_bound
from fedmentor_core.audit.canaries import make_canaries
from fedmentor_core.audit.page import allowed_tpr
from fedmentor_core.audit.probes import Probe
from fedmentor_core.audit.records import AuditReport, DomainAudit
from fedmentor_core.audit.recount import epsilon_pld_elsewhere, epsilon_rdp_elsewhere
from fedmentor_core.audit.run import run_audit
from fedmentor_core.config import StudyConfig
from fedmentor_core.errors import ConfigError, OutputExistsError
from fedmentor_core.privacy import engine
from fedmentor_core.privacy import filter as filter_module
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.records import PrivacySpend
from fedmentor_core.training import client, sampler
from fedmentor_core.workspace import Workspace

N_CANARIES = 24
PROBES = {"noise", "fresh noise", "empty batches", "sensitivity", "released pair"}


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setattr(membership, "N_BOOTSTRAP", 50)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def study(tiny_study) -> StudyConfig:
    tiny_study["domains"] = tiny_study["domains"][:1]
    return StudyConfig.model_validate(tiny_study)


@pytest.fixture
def audit(study, tmp_path) -> Callable[[], DomainAudit]:
    """The whole audit of one domain."""

    def go() -> DomainAudit:
        report = run_audit(study, tmp_path / "audit", n_canaries=N_CANARIES)
        assert report.passed == report.domains[0].passed == (not report.reasons)
        return report.domains[0]

    return go


@pytest.fixture
def audit_without_probes(audit, monkeypatch) -> Callable[[], DomainAudit]:
    """For faults of the ledger, which no probe looks at."""
    monkeypatch.setattr(run, "run_probes", lambda *given: [])
    return audit


@pytest.fixture(scope="module")
def probe(tiny_backbone_folder, tmp_path_factory) -> Probe:
    """One for all tests of single probes: a sabotage is undone after its test, and probes leave nothing behind."""
    study = StudyConfig.model_validate(
        {
            "name": "probed",
            "rounds": 2,
            "backbone": {"name": str(tiny_backbone_folder), "max_length": 160},
            "adapter": {"rank": 4, "alpha": 8.0},
            "domains": [
                {"name": "one", "source": {"kind": "invented", "corpus": "peer_forum", "n_units": 60}, "epsilon": 8.0}
            ],
            "training": {"steps_per_round": 2, "batch_size": 8, "microbatch_size": 4, "max_target_tokens": 40},
            "evaluation": {"gate_data": "public", "max_new_tokens": 8},
        }
    )
    workspace = run._prepare(study, tmp_path_factory.mktemp("probe"), None, N_CANARIES)
    plan = workspace.plan.domains[0]
    assert plan.noise_multiplier is not None
    return Probe(workspace, plan, plan.noise_multiplier)


def test_probes_pass_on_the_production_engine(probe):
    assert all(check.passed for check in probes.run_probes(probe.workspace, probe.plan, probe.noise_multiplier))


def failed(audit: DomainAudit) -> set[str]:
    return {check.name for check in audit.checks if not check.passed}


def sabotage_engine(monkeypatch, **changes: Callable[[Any], Any]) -> None:
    """Production calls the engine as ever; the engine quietly makes something else of the arguments."""
    original = engine.make_private_optimizer

    def broken(optimizer, **arguments):
        made = {**arguments, **{name: change(arguments) for name, change in changes.items()}}
        return original(optimizer, **made)

    monkeypatch.setattr(engine, "make_private_optimizer", broken)


# --- the production path ---------------------------------------------------------------------------------------------


def test_production_path_passes(study, tmp_path):
    report = run_audit(study, tmp_path / "audit", n_canaries=N_CANARIES)
    assert report.reasons == ()
    assert report.passed
    one = report.domains[0]
    assert one.epsilon_lower_bound <= one.epsilon_claimed
    assert one.epsilon_claimed == pytest.approx(one.epsilon_recomputed, rel=3e-3)
    assert one.epsilon_recomputed_pld < one.epsilon_claimed <= 8.0
    assert one.n_canaries == N_CANARIES
    assert 0 < one.n_included < N_CANARIES
    assert one.steps == 4
    assert {check.name for check in one.checks} > PROBES
    contract = {
        "passed", "epsilon_lower_bound", "epsilon_claimed", "confidence", "mia_auc", "tpr_at_1pct_fpr", "n_canaries",
        "reasons",
    }  # fmt: skip
    assert contract <= set(json.loads(report.model_dump_json()))
    assert AuditReport.model_validate_json(report.model_dump_json()) == report

    with pytest.raises(OutputExistsError, match="not resumed"):
        run_audit(study, tmp_path / "audit", n_canaries=N_CANARIES)


def test_released_model_and_its_ledger_are_out_of_reach(study, tmp_path):
    released = study.model_copy(
        update={
            "storage": study.storage.model_copy(update={"url": (tmp_path / "released").as_uri()}),
            "privacy": study.privacy.model_copy(update={"ledger_url": (tmp_path / "lifetime").as_uri()}),
        }
    )
    workspace = run._prepare(released, tmp_path / "audit", None, N_CANARIES)
    assert workspace.store.url == workspace.ledger_store.url == (tmp_path / "audit" / "store").as_uri()
    assert not workspace.config.tracking.enabled
    same = ("rounds", "training", "adapter", "adaptation", "seed", "backbone")
    assert all(getattr(workspace.config, name) == getattr(study, name) for name in same)


def test_canaries_are_distinct_and_their_coins_fair_and_secret():
    torch.manual_seed(0)
    one = make_canaries(2000)
    torch.manual_seed(0)
    assert make_canaries(2000).included != one.included
    assert len(set(one.posts)) == len(set(one.responses)) == 2000
    assert abs(sum(one.included) - 1000) < 160  # 7 standard deviations
    for n in (7, 20_001):
        with pytest.raises(ConfigError, match="canaries: got"):
            make_canaries(n)


def test_a_left_out_canary_is_a_unit_without_gradient(study, tmp_path):
    plain = run._prepare(study, tmp_path / "a", None, N_CANARIES)
    before = Workspace(plain.ref).training_set("one")
    after = plain.training_set("one")
    assert after.n_units == before.n_units + N_CANARIES == plain.plan.domains[0].n_units
    assert list(after.labels[: len(before.labels)]) == list(before.labels)
    for row, included in zip(range(len(before.labels), len(after.labels)), plain.canaries["one"].included, strict=True):
        assert any(label >= 0 for label in after.labels[row]) is included
    left_out = plain.canaries["one"].included.index(False)
    _, norm = probes._gradient(
        Probe(plain, plain.plan.domains[0], 1.0), probes._silent(plain.canary_set("one")), left_out
    )
    assert norm == 0.0


def test_nothing_to_audit_is_said(study, tmp_path):
    without = study.model_copy(update={"privacy": study.privacy.model_copy(update={"mode": "none"})})
    with pytest.raises(ConfigError, match="nothing to audit"):
        run_audit(without, tmp_path / "a")
    with pytest.raises(ConfigError, match="allowed: one"):
        run_audit(study, tmp_path / "a", domain="three")
    per_client = study.model_copy(update={"privacy": study.privacy.model_copy(update={"level": "client"})})
    with pytest.raises(ConfigError, match="allows 'unit' only"):
        run_audit(per_client, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_seeded_noise_is_not_private(study, tmp_path):
    seeded = study.model_copy(update={"privacy": study.privacy.model_copy(update={"noise_seed": 5})})
    report = run_audit(seeded, tmp_path / "a", n_canaries=N_CANARIES)
    assert failed(report.domains[0]) == {"production run", "fresh noise"}


# --- sabotage: noise --------------------------------------------------------------------------------------------------


def add_nothing(self):
    for parameter in self.params:
        parameter.grad = parameter.summed_grad.view_as(parameter)


def test_noise_off_is_caught(audit, monkeypatch):
    monkeypatch.setattr(DPOptimizer, "add_noise", add_nothing)
    assert {"noise of the run", "noise", "fresh noise", "empty batches"} <= failed(audit())


def test_noise_multiplier_of_nearly_nothing_is_caught(audit, monkeypatch):
    sabotage_engine(monkeypatch, noise_multiplier=lambda given: 1e-6)
    assert {"noise of the run", "noise", "empty batches"} <= failed(audit())


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_noise_of_the_wrong_size_is_caught(probe, monkeypatch, share):
    sabotage_engine(monkeypatch, noise_multiplier=lambda given: share * given["noise_multiplier"])
    assert not probes.noise_checks(probe)[0].passed
    assert not probes.empty_batches(probe).passed


def test_a_call_that_asks_for_less_noise_than_was_charged_is_caught(study, tmp_path, monkeypatch):
    """The engine is right and the round calls it wrongly: only the steps of the run itself can tell."""
    original = client_round.LocalRound

    def quieter(**given):
        return original(**{**given, "noise_multiplier": 0.8 * given["noise_multiplier"]})

    monkeypatch.setattr(client_round, "LocalRound", quieter)
    workspace = run._prepare(study, tmp_path / "a", None, N_CANARIES)
    trace = run.train_with_canaries(workspace)
    noise, _ = run.step_checks(workspace, workspace.plan.domains[0], trace.of("one"))
    assert not noise.passed


def test_noise_from_a_constant_seed_is_caught(probe, monkeypatch):
    sabotage_engine(monkeypatch, noise_seed=lambda given: 1)
    law, fresh = probes.noise_checks(probe)
    assert law.passed
    assert not fresh.passed


def test_noise_of_the_wrong_shape_is_caught(probe, monkeypatch):
    def coarse(self):
        for parameter in self.params:
            noise = torch.sign(torch.randn_like(parameter)) * self.noise_multiplier * self.max_grad_norm
            parameter.grad = (parameter.summed_grad + noise).view_as(parameter)

    monkeypatch.setattr(DPOptimizer, "add_noise", coarse)
    assert not probes.noise_checks(probe)[0].passed


def test_a_skipped_empty_batch_is_caught(probe, monkeypatch):
    original = engine.private_step

    def lazy(optimizer, microbatches, **rest):
        batches = list(microbatches)
        if batches:
            original(optimizer, batches, **rest)

    monkeypatch.setattr(engine, "private_step", lazy)
    check = probes.empty_batches(probe)
    assert not check.passed
    assert "0 of 2" in check.detail


# --- sabotage: clipping -----------------------------------------------------------------------------------------------


def test_clipping_off_is_caught(audit, monkeypatch):
    wide = 1e8  # and the noise stays at sigma C
    sabotage_engine(
        monkeypatch,
        clip_norm=lambda given: wide * given["clip_norm"],
        noise_multiplier=lambda given: given["noise_multiplier"] / wide,
    )
    assert {"sensitivity", "released pair"} <= failed(audit())


def test_a_clip_twice_too_wide_is_caught(probe, monkeypatch):
    sabotage_engine(
        monkeypatch,
        clip_norm=lambda given: 2 * given["clip_norm"],
        noise_multiplier=lambda given: given["noise_multiplier"] / 2,
    )
    check = probes.sensitivity(probe)
    assert not check.passed
    found = re.search(r"moved the clipped sum by ([0-9.]+) C", check.detail)
    # The moved length is a difference of two sums in float32: its fourth digit depends on the processor.
    assert found is not None
    assert float(found[1]) == pytest.approx(2.0, rel=0.01)


def test_clipping_each_tensor_apart_is_caught(probe, monkeypatch):
    def per_tensor(self):
        (adapter,) = self.params
        clipped = []
        for rows in adapter.grad_sample.split(self._sizes, dim=1):
            factors = (self.max_grad_norm / (rows.norm(dim=1) + 1e-6)).clamp(max=1.0)
            clipped.append(factors @ rows)
        summed = torch.cat(clipped)
        adapter.summed_grad = summed if adapter.summed_grad is None else adapter.summed_grad + summed

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", per_tensor)
    assert not probes.sensitivity(probe).passed


def test_the_run_itself_shows_steps_that_are_too_long(study, tmp_path, monkeypatch):
    """With a clip norm far below the gradients, no probe is needed to see that nothing was clipped."""
    tight = study.model_copy(update={"privacy": study.privacy.model_copy(update={"clip_norm": 1e-4})})
    sabotage_engine(
        monkeypatch,
        clip_norm=lambda given: 1e8 * given["clip_norm"],
        noise_multiplier=lambda given: given["noise_multiplier"] / 1e8,
    )
    workspace = run._prepare(tight, tmp_path / "a", None, N_CANARIES)
    trace = run.train_with_canaries(workspace)
    noise, norm = run.step_checks(workspace, workspace.plan.domains[0], trace.of("one"))
    assert noise.passed
    assert not norm.passed


# --- sabotage: ledger and sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": lambda given: 1}, "steps were taken"),
        ({"noise_multiplier": lambda given: 1.2 * given["noise_multiplier"]}, "charged at noise multiplier"),
        ({"sample_rate": lambda given: 0.5 * given["sample_rate"]}, "charged at sample rate"),
    ],
    ids=["fewer-steps", "more-noise", "lower-rate"],
)
def test_an_under_charging_ledger_is_caught(audit_without_probes, monkeypatch, change, words):
    original = Ledger.charge

    def cheap(self, account, **given):
        return original(self, account, **{**given, **{name: make(given) for name, make in change.items()}})

    monkeypatch.setattr(Ledger, "charge", cheap)
    made = audit_without_probes()
    assert failed(made) == {"ledger"}
    detail = next(check.detail for check in made.checks if check.name == "ledger")
    assert words in detail
    assert made.epsilon_claimed < made.epsilon_recomputed


def test_an_accountant_that_halves_the_price_is_caught(audit_without_probes, monkeypatch):
    original = PrivacyAccount.charge_of
    monkeypatch.setattr(PrivacyAccount, "charge_of", lambda *given: original(*given) / 2)
    made = audit_without_probes()
    assert failed(made) == {"ledger"}
    assert "by dp-accounting" in next(check.detail for check in made.checks if check.name == "ledger")


def test_training_without_a_charge_is_caught(audit_without_probes, monkeypatch):
    monkeypatch.setattr(Ledger, "charge", lambda self, account, **given: None)
    assert failed(audit_without_probes()) == {"ledger"}


def test_more_steps_than_were_assigned_are_caught(audit_without_probes, monkeypatch):
    original = sampler.poisson_batches

    def twice(n_units, sample_rate, steps, seed):
        return original(n_units, sample_rate, 2 * steps, seed)

    monkeypatch.setattr(client, "poisson_batches", twice)
    assert "ledger" in failed(audit_without_probes())


def test_sampling_above_the_charged_rate_is_caught(study, tmp_path, monkeypatch):
    original = sampler.poisson_batches
    monkeypatch.setattr(client, "poisson_batches", lambda n, rate, steps, seed: original(n, 4 * rate, steps, seed))
    workspace = run._prepare(study, tmp_path / "a", None, N_CANARIES)
    trace = run.train_with_canaries(workspace)
    check = run.sampling_check(workspace, workspace.plan.domains[0], trace.of("one"), n_attempts=2)
    assert not check.passed


def test_a_retry_that_was_charged_twice_is_right(audit_without_probes, monkeypatch):
    """A failed attempt costs budget, and the recount knows that it was there."""
    original, calls = client_round.train_locally, []

    def once_broken(*given, **rest):
        calls.append(1)
        state = original(*given, **rest)
        if len(calls) == 1:
            raise RuntimeError("the first attempt dies after its last step")
        return state

    monkeypatch.setattr(client_round, "train_locally", once_broken)
    made = audit_without_probes()
    assert made.passed, failed(made)
    assert made.steps == 6  # two rounds of two, and the attempt that died


# --- the one-run bound alone --------------------------------------------------------------------------------------------


def test_canaries_alone_convict_a_run_without_noise(tiny_study, tmp_path, monkeypatch):
    """Few posts beside many canaries, every second unit in a batch, no noise: the bound passes a small claim alone."""
    tiny_study["rounds"] = 1
    tiny_study["privacy"] = {"clip_norm": 0.05, "max_noise_multiplier": 200.0}
    tiny_study["training"] |= {
        "steps_per_round": 4, "batch_size": 60, "microbatch_size": 64, "learning_rate": 1e-4, "rows_per_unit": "one",
    }  # fmt: skip
    tiny_study["domains"] = [tiny_study["domains"][0] | {"epsilon": 0.2}]
    monkeypatch.setattr(DPOptimizer, "add_noise", add_nothing)
    monkeypatch.setattr(filter_module, "choose_order", lambda *given: 60.0)  # any order is valid; finding one is slow
    workspace = run._prepare(StudyConfig.model_validate(tiny_study), tmp_path / "a", None, 100, units={"one": 108})
    trace = run.train_with_canaries(workspace)
    scores = gradient_scores(workspace, trace.of("one"), workspace.plan.domains[0])
    best, _ = best_bound(scores, workspace.canaries["one"].included, 1e-5)
    claimed = workspace.ledger("one").view().epsilon_spent
    assert not run.bound_check(best.epsilon, claimed, 0.95).passed, (best, claimed)


# --- pieces -------------------------------------------------------------------------------------------------------------


def test_recount_agrees_with_the_reference_table():
    history = [
        PrivacySpend(noise_multiplier=s, sample_rate=q, steps=n) for s, q, n in [(1, 0.01, 500), (1.5, 0.05, 200)]
    ]
    assert epsilon_pld_elsewhere(history, 1e-5) == pytest.approx(2.6862, abs=0.01)
    assert min(epsilon_rdp_elsewhere(history, order, 1e-5) for order in (4.5, 5, 5.5, 6, 7, 8)) == pytest.approx(
        2.967, abs=0.01
    )
    assert epsilon_rdp_elsewhere([], 5, 1e-5) == 0.0
    assert epsilon_rdp_elsewhere([PrivacySpend(noise_multiplier=0, sample_rate=0.1, steps=1)], 5, 1e-5) == math.inf


def test_allowed_tpr_is_the_dp_bound():
    assert allowed_tpr(0.1, 1.0, 0.0) == pytest.approx(0.1 * math.e)
    assert allowed_tpr(0.9, 1.0, 0.0) == pytest.approx(1 - 0.1 / math.e)
    assert allowed_tpr(0.0, 0.0, 1e-5) == pytest.approx(1e-5)
    assert allowed_tpr(1.0, 900.0, 0.0) == 1.0


def test_audit_leaves_no_hook_behind(probe):
    from torch.optim import optimizer as module

    before = dict(module._global_optimizer_pre_hooks)
    probes.noise_checks(probe)
    assert dict(module._global_optimizer_pre_hooks) == before
    assert "audit" not in inspect.getsource(client)  # production knows nothing of it


# --- the command ---------------------------------------------------------------------------------------------------------


def test_command_passes_fails_and_leaves_its_files(tiny_study, tmp_path, capsys, monkeypatch):
    import yaml

    from flows import cli
    from flows.auditing import units_of

    tiny_study["domains"] = tiny_study["domains"][:1]
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_study), encoding="utf-8")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmentor", "audit", "-c", str(config), "--canaries", "24", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    code, shown, _ = call("--out", str(tmp_path / "a"), "--units", "one=40", "--json")
    assert code == 0
    assert json.loads(shown)["passed"] is True
    assert json.loads(shown)["domains"][0]["n_units"] == 40
    assert json.loads((tmp_path / "a" / "audit.json").read_text()) == json.loads(shown)
    page = (tmp_path / "a" / "audit.html").read_text()
    assert "cannot see" in page
    assert "<script" not in page

    code, _, message = call("--out", str(tmp_path / "a"))
    assert code == 2
    assert "already holds" in message

    monkeypatch.setattr(run, "run_probes", lambda *given: [])
    code, shown, _ = call("--out", str(tmp_path / "b"), "--set", "privacy.noise_seed=3")
    assert code == 3
    assert "FAILED" in shown
    assert "seeded noise" in shown
    assert "no proof of privacy" in " ".join(shown.split())
    assert "cost no budget" in " ".join(shown.split())

    code, _, message = call("--out", str(tmp_path / "c"), "--with-own-data")
    assert code == 2
    assert "privacy.ledger_url is not set" in message
    for given in (["many"], ["one=x"], ["40", "one=40"]):
        with pytest.raises(ConfigError, match="--units: got"):
            units_of(StudyConfig.model_validate(tiny_study), given)
    assert units_of(StudyConfig.model_validate(tiny_study), []) is None
