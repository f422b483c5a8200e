"""A private gate set in a study: noised, charged, reused free, and nothing un-noised anywhere."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch

from fedmentor_core import private_gate, rounds
from fedmentor_core.config_io import validate_config
from fedmentor_core.data.loading import DomainData
from fedmentor_core.errors import BudgetError, ConfigError, DataError, IntegrityError, LedgerError
from fedmentor_core.evaluation.evaluate import metrics_of_rows
from fedmentor_core.evaluation.scores import RowScores
from fedmentor_core.evaluation.utility import UtilityScorer
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.privacy import discrete_gaussian
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.privacy.release import GRID, UnitScores, grid_sum
from fedmentor_core.privacy.validation_plan import check_disjoint_units, noise_of_next_release, promised_account
from fedmentor_core.records import ArtifactRef, DomainEvaluation, ValidationPlan
from fedmentor_core.study import run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace


class DeathError(Exception):
    """The process dies here."""


def die(*_: Any, **__: Any) -> None:
    raise DeathError


@pytest.fixture(autouse=True)
def light() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fake_rows(model: Any, tokenizer: Any, data: Any, *_: Any, on_batch: Any, **__: Any) -> list[RowScores]:
    """Scores without a model: what is tested is what happens around them."""
    on_batch(len(data.rows), len(data.rows))
    return [RowScores("yes", "x", 0.8, 0.6, 0.1, True, str(row["label"]), "yes") for row in data.rows]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_gate, "score_rows", fake_rows)


@pytest.fixture
def private_study(tiny_study: dict) -> dict:
    tiny_study["evaluation"] |= {"gate_data": "private", "private": {"epsilon": 4.0}, "max_gate_examples": 100}
    return tiny_study


def opened(raw: dict, out: Path) -> Workspace:
    return Workspace(open_study(validate_config(raw), out))


@pytest.fixture
def workspace(private_study: dict, tmp_path: Path) -> Workspace:
    return opened(private_study, tmp_path / "out")


def adapters(workspace: Workspace, n: int) -> list[ArtifactRef]:
    """The initial adapter and others that differ from it."""
    first = workspace.initial_adapter.trained
    state = workspace.get_adapter(first)
    others = [{name: tensor + 0.01 * k for name, tensor in state.items()} for k in range(1, n)]
    return [first, *(workspace.put_adapter(other) for other in others)]


def plan_of(workspace: Workspace, split: str = "gate") -> ValidationPlan:
    return next(one for one in workspace.plan.domains[0].validation if one.split == split)


def raw_entries(workspace: Workspace, account: str = "one.gate") -> list[dict]:
    """The ledger's files as they lie there, read without the ledger's code."""
    folder = Path(workspace.ref.out_dir) / "store" / "ledgers" / account
    return [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def kinds(workspace: Workspace) -> list[str]:
    return [entry["kind"] for entry in raw_entries(workspace)]


def stored(workspace: Workspace, adapter: ArtifactRef) -> bytes:
    return workspace.store.get_bytes(workspace.key(f"evaluations/{adapter.sha256[:24]}/gate-one.json"))


def independent_epsilon(workspace: Workspace) -> float:
    """Epsilon of all charged releases at the fixed order, by dp_accounting."""
    entries = raw_entries(workspace)
    accountant = dp_accounting.rdp.RdpAccountant([entries[0]["rdp_order"]])
    for entry in entries:
        if entry["kind"] == "evaluation":
            accountant.compose(dp_accounting.GaussianDpEvent(entry["noise_multiplier"]), entry["steps"])
    return float(accountant.get_epsilon(entries[0]["delta"]))


# --- the plan --------------------------------------------------------------------------------------------------


def test_plan_says_what_each_private_set_will_cost(workspace: Workspace) -> None:
    for domain in workspace.plan.domains:
        assert [(one.account, one.releases) for one in domain.validation] == [
            (f"{domain.domain}.gate", 3),
            (f"{domain.domain}.test", 2),
        ]
        for one in domain.validation:
            assert one.n_units <= workspace.data[domain.domain].n_units[one.split]
            assert one.metric_std == pytest.approx(one.noise_multiplier * math.sqrt(6) / one.n_units)
            assert one.epsilon_planned <= one.epsilon_budget == 4.0
            assert one.delta < 1 / one.n_units
            assert any(one.account in warning and "standard deviation" in warning for warning in domain.warnings)
            assert not one.refusal
    assert plan_of(workspace, "test").n_units == 4


def test_more_units_make_less_noise_and_silence_the_warning(private_study: dict, tmp_path: Path) -> None:
    private_study["evaluation"] |= {"max_test_examples": 100}
    for domain in private_study["domains"]:
        domain |= {"validation_epsilon": 60.0}
    workspace = opened(private_study, tmp_path / "out")
    assert [warning for domain in workspace.plan.domains for warning in domain.warnings if "one.gate" in warning] == []
    assert plan_of(workspace).epsilon_budget == 60.0


def test_public_study_has_no_validation_account(tiny_study: dict, tmp_path: Path) -> None:
    assert all(domain.validation == () for domain in opened(tiny_study, tmp_path / "out").plan.domains)


def test_delta_must_stay_below_one_over_the_units(private_study: dict, tmp_path: Path) -> None:
    private_study["evaluation"]["private"]["delta"] = 0.09
    private_study["evaluation"]["max_test_examples"] = 100
    with pytest.raises(ConfigError, match=r"evaluation\.private\.delta"):
        opened(private_study, tmp_path / "out").make_plan()


def test_set_is_cut_to_whole_units(private_study: dict, tmp_path: Path) -> None:
    private_study["evaluation"]["max_gate_examples"] = 3
    workspace = opened(private_study, tmp_path / "out")
    for domain in workspace.config.domains:
        data, table = workspace.evaluation_set(domain.name, "gate"), workspace.data[domain.name].gate
        units = {row["unit_id"] for row in data.rows}
        assert len(units) == 3
        assert len(data.rows) == sum(unit in units for unit in table["unit_id"][:])


def with_rows(data: DomainData, **splits: Any) -> DomainData:
    """The same domain with other rows in some splits."""
    return dataclasses.replace(data, rows={**data.rows, **splits})


def test_units_of_two_splits_are_refused(workspace: Workspace) -> None:
    check_disjoint_units(workspace.data)
    one = workspace.data["one"]
    with pytest.raises(DataError, match="two of train, gate and test"):
        check_disjoint_units({"one": with_rows(one, gate=one.rows["train"])})
    swapped = with_rows(one, train=one.rows["gate"], gate=one.rows["train"])
    with pytest.raises(DataError, match="two of train, gate and test"):  # another domain's training posts
        check_disjoint_units({**workspace.data, "three": swapped})


# --- a release -------------------------------------------------------------------------------------------------


def test_release_is_charged_before_a_row_is_evaluated_and_reused_free(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    progress: list[tuple[int, int]] = []

    def scoring(*args: Any, **options: Any) -> list[RowScores]:
        seen.append(kinds(workspace))
        return fake_rows(*args, **options)

    monkeypatch.setattr(private_gate, "score_rows", scoring)
    (adapter,) = adapters(workspace, 1)
    plan = plan_of(workspace)
    result = rounds.evaluate(workspace, adapter, "one", "gate", lambda *done: progress.append(done))
    assert seen == [["plan", "evaluation"]]
    assert kinds(workspace) == ["plan", "evaluation", "release"]
    charge, release = raw_entries(workspace)[1:]
    assert (charge["noise_multiplier"], charge["sample_rate"], charge["steps"]) == (plan.noise_multiplier, 1.0, 1)
    assert charge["rdp_charge"] == pytest.approx(charge["rdp_order"] / (2 * plan.noise_multiplier**2))
    assert charge["adapter_sha256"] == release["adapter_sha256"] == adapter.sha256
    assert release["digest"] == sha256_bytes(stored(workspace, adapter))
    assert result.metric_std == plan.metric_std
    assert (result.samples, result.metrics.toxicity_max, result.metrics.n_examples) == ((), None, plan.n_units)
    assert progress == [(plan.n_units, plan.n_units)]  # units: how many rows they have is private
    assert result == DomainEvaluation.model_validate_json(stored(workspace, adapter))

    monkeypatch.setattr(private_gate, "score_rows", die)
    assert rounds.evaluate(workspace, adapter, "one", "gate") == result
    assert kinds(workspace) == ["plan", "evaluation", "release"]


def test_planned_releases_fit_and_the_account_outlives_the_run(
    private_study: dict, tmp_path: Path, quick: None
) -> None:
    private_study["privacy"] = {"ledger_url": (tmp_path / "ledgers").as_uri(), "planned_runs": 2}
    stds = []
    for name in ("first", "second"):
        workspace = opened(private_study, tmp_path / name)
        plan = plan_of(workspace)
        results = [rounds.evaluate(workspace, one, "one", "gate") for one in adapters(workspace, plan.releases)]
        assert {result.metric_std for result in results} == {plan.metric_std}
        ledger = workspace.ledger("one.gate")
        assert ledger.spent_rdp() <= plan.run_rdp_budget * (1 + 1e-9)
        assert ledger.view().epsilon_spent == pytest.approx(plan.epsilon_planned)
        stds.append(plan.metric_std)
    assert stds[1] == pytest.approx(stds[0], rel=0.05)
    assert plan.epsilon_spent_before > 0
    assert ledger.view().epsilon_spent <= 4.0
    assert workspace.ledger("one").spent_rdp() == 0  # training has an account of its own

    private_study["domains"][0]["validation_epsilon"] = 9.0
    with pytest.raises(BudgetError, match="was promised validation epsilon 4"):
        opened(private_study, tmp_path / "third").preflight()


def test_study_whose_validation_budget_is_spent_is_refused_at_its_plan(
    private_study: dict, tmp_path: Path, quick: None
) -> None:
    private_study["privacy"] = {"ledger_url": (tmp_path / "ledgers").as_uri()}
    first = opened(private_study, tmp_path / "first")
    ledger, plan = first.ledger("one.gate"), plan_of(first)
    account = ledger.open_account(promised_account(plan), run_id="r", dataset_fingerprint="f")
    noise = math.sqrt(account.rdp_order / (2 * account.rdp_budget)) * (1 + 1e-9)
    ledger.charge_evaluation(
        account, run_id="r", adapter_sha256="a", attempt=0, dataset_fingerprint="f", noise_multiplier=noise
    )
    second = opened(private_study, tmp_path / "second")
    with pytest.raises(BudgetError, match="the gate cannot be judged"):
        second.preflight()
    assert any("carries no 3 further releases" in refusal for refusal in second.make_plan().refusals)


@pytest.mark.parametrize("where", ["score_rows", "release_means", "put_json"])
def test_death_before_the_store_stays_charged(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, quick: None, where: str
) -> None:
    first, second, third = adapters(workspace, 3)
    plan = plan_of(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(workspace.store if where == "put_json" else private_gate, where, die)
        with pytest.raises(Exception, match="DeathError"):
            rounds.evaluate(workspace, first, "one", "gate")
    assert kinds(workspace) == ["plan", "evaluation"]

    results = [rounds.evaluate(workspace, one, "one", "gate") for one in (first, second, third)]
    assert kinds(workspace) == ["plan", "evaluation", *["evaluation", "release"] * 3]
    assert [entry["attempt"] for entry in raw_entries(workspace)[1:]] == [0, 1, 1, 0, 0, 0, 0]
    assert all(result.metric_std > plan.metric_std for result in results)  # the lost charge is paid by more noise
    view = Ledger(workspace.store, "one.gate").view()
    assert view.epsilon_spent == pytest.approx(independent_epsilon(workspace), abs=1e-3)
    assert view.epsilon_spent <= plan.epsilon_budget


def test_death_after_the_store_hands_out_the_same_numbers(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    (adapter,) = adapters(workspace, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "release_evaluation", die)
        with pytest.raises(Exception, match="DeathError"):
            rounds.evaluate(workspace, adapter, "one", "gate")
    before = stored(workspace, adapter)
    assert kinds(workspace) == ["plan", "evaluation"]
    monkeypatch.setattr(private_gate, "score_rows", die)
    result = rounds.evaluate(workspace, adapter, "one", "gate")
    assert stored(workspace, adapter) == before
    assert result == DomainEvaluation.model_validate_json(before)
    assert kinds(workspace) == ["plan", "evaluation", "release"]
    assert raw_entries(workspace)[2]["digest"] == sha256_bytes(before)


def test_slower_of_two_processes_publishes_nothing_of_its_own(
    private_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (opened(private_study, tmp_path / "out") for _ in range(2))
    adapter = adapters(one, 1)[0]
    faster: list[DomainEvaluation] = []

    def overtaken(*args: Any, **options: Any) -> list[RowScores]:
        monkeypatch.setattr(private_gate, "score_rows", fake_rows)
        faster.append(rounds.evaluate(two, adapter, "one", "gate"))
        return fake_rows(*args, **options)

    monkeypatch.setattr(private_gate, "score_rows", overtaken)
    assert rounds.evaluate(one, adapter, "one", "gate") == faster[0]
    assert kinds(one) == ["plan", "evaluation", "evaluation", "release"]  # both paid, one number left


def test_changed_metrics_are_not_handed_out(workspace: Workspace, quick: None) -> None:
    (adapter,) = adapters(workspace, 1)
    rounds.evaluate(workspace, adapter, "one", "gate")
    (path,) = Path(workspace.ref.out_dir).rglob("gate-one.json")
    path.write_bytes(path.read_bytes().replace(b'"safe_rate":', b'"safe_rate": '))
    with pytest.raises(IntegrityError, match="not the one that the ledger"):
        rounds.evaluate(workspace, adapter, "one", "gate")


def test_changed_units_and_broken_ledgers_stop_before_a_charge(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_gate, "score_rows", die)
    (adapter,) = adapters(workspace, 1)
    one = workspace.data["one"]
    assert workspace.plan  # made before the change
    others = [row for row in one.rows["gate"] if row.unit != one.rows["gate"][0].unit]
    with monkeypatch.context() as patch:
        patch.setitem(workspace.data, "one", with_rows(one, gate=others))
        with pytest.raises(DataError, match="changed since this study was planned"):
            rounds.evaluate(workspace, adapter, "one", "gate")
    assert kinds(workspace) == []
    with pytest.raises(Exception, match="DeathError"):
        rounds.evaluate(workspace, adapter, "one", "gate")
    (Path(workspace.ref.out_dir) / "store" / "ledgers" / "one.gate" / "00000001.json").write_bytes(b"{}")
    with pytest.raises(LedgerError):
        rounds.evaluate(workspace, adapter, "one", "gate")


def test_retries_make_noisier_releases_until_none_is_worth_having(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry never strands the study at once: later releases pay with noise, and the budget holds throughout."""
    monkeypatch.setattr(private_gate, "score_rows", die)
    (adapter,) = adapters(workspace, 1)
    for _ in range(40):
        with pytest.raises(Exception, match=r"DeathError|cannot be judged any more") as caught:
            rounds.evaluate(workspace, adapter, "one", "gate")
        if isinstance(caught.value, BudgetError):
            break
    else:
        pytest.fail("the budget never ran out")
    noise = [entry["noise_multiplier"] for entry in raw_entries(workspace) if entry["kind"] == "evaluation"]
    assert len(noise) > 4
    assert noise == sorted(noise)
    assert noise[-1] <= 4 * plan_of(workspace).noise_multiplier
    assert independent_epsilon(workspace) <= 4.0 + 1e-3


def test_last_release_has_a_spare(workspace: Workspace) -> None:
    plan = plan_of(workspace)
    account = promised_account(plan)
    cost = account.charge_of(plan.noise_multiplier, 1.0, 1)
    assert noise_of_next_release(plan, account, spent_rdp=2 * cost, released=2) == plan.noise_multiplier
    again = noise_of_next_release(plan, account, spent_rdp=3 * cost, released=2)
    assert plan.noise_multiplier < again < 4 * plan.noise_multiplier
    with pytest.raises(BudgetError, match="cannot be judged any more"):
        noise_of_next_release(plan, account, spent_rdp=account.rdp_budget, released=2)


def test_failure_does_not_quote_the_data(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("a post about me")

    monkeypatch.setattr(private_gate, "score_rows", failing)
    with pytest.raises(Exception, match="RuntimeError") as caught:
        rounds.evaluate(workspace, adapters(workspace, 1)[0], "one", "gate")
    assert "about me" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_baseline_without_privacy_still_charges_its_private_gate(
    private_study: dict, tmp_path: Path, quick: None
) -> None:
    private_study["privacy"] = {"mode": "none"}
    workspace = opened(private_study, tmp_path / "out")
    result = rounds.evaluate(workspace, adapters(workspace, 1)[0], "one", "gate")
    assert result.metric_std == plan_of(workspace).metric_std
    assert kinds(workspace) == ["plan", "evaluation", "release"]


def test_seeded_noise_is_marked(private_study: dict, tmp_path: Path, quick: None) -> None:
    private_study["privacy"] = {"noise_seed": 5}
    found = []
    for name in ("a", "b"):
        workspace = opened(private_study, tmp_path / name)
        found.append(rounds.evaluate(workspace, adapters(workspace, 1)[0], "one", "gate").metrics)
        assert [entry["seeded"] for entry in raw_entries(workspace)] == [False, True, True]
    assert found[0] == found[1]


def test_other_splits_of_the_same_posts_draw_from_the_same_accounts_and_are_reported(
    private_study: dict, tmp_path: Path, quick: None
) -> None:
    private_study["privacy"] = {"ledger_url": (tmp_path / "ledgers").as_uri()}
    first = opened(private_study, tmp_path / "first")
    rounds.evaluate(first, adapters(first, 1)[0], "one", "gate")
    private_study["data"] = {"split_seed": 77}
    second = opened(private_study, tmp_path / "second")
    assert plan_of(second).epsilon_spent_before > 0
    shared = [one for one in second.plan.shared_posts if {"one", "one.gate"} <= set(one.accounts)]
    assert shared
    assert all(one.epsilon_budget >= 8.0 + 4.0 for one in shared)


# --- a whole study ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sabotaged", [False, True], ids=["noised", "without noise the search finds it"])
def test_rule_sees_released_numbers_only_and_no_byte_holds_an_unnoised_one(
    private_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotaged: bool
) -> None:
    """The real scorers run; what they said, and its means, are searched in every file that the study wrote."""
    private_study["rounds"] = 1
    exact: list[RowScores] = []
    means: set[float] = set()
    received: list[Any] = []
    score_rows, vectors_of, adapt = private_gate.score_rows, private_gate.unit_scores, rounds.adapt

    def scoring(*args: Any, **options: Any) -> list[RowScores]:
        scored = score_rows(*args, **options)
        exact.extend(scored)
        means.update(metrics_of_rows(scored).model_dump().values())
        return scored

    def summing(*args: Any) -> list[UnitScores]:
        vectors = vectors_of(*args)
        means.update(total / (GRID * len(vectors)) for total in grid_sum(vectors))
        return vectors

    def adapting(workspace: Any, state: Any, metrics: Any, *rest: Any) -> Any:
        received.append(metrics)
        return adapt(workspace, state, metrics, *rest)

    monkeypatch.setattr(private_gate, "score_rows", scoring)
    monkeypatch.setattr(private_gate, "unit_scores", summing)
    monkeypatch.setattr(rounds.commit, "adapt", adapting)
    if sabotaged:
        monkeypatch.setattr(discrete_gaussian, "sample", lambda scale, dice: 0)
    ref = open_study(validate_config(private_study), tmp_path / "out")
    summary = run_study(ref)

    (metrics,) = received
    store = Path(ref.out_dir) / "store"
    for domain in ("one", "two"):
        files = [path.read_bytes() for path in store.rglob(f"gate-{domain}.json")]
        digests = {entry["digest"] for entry in _entries(store, f"{domain}.gate") if entry["kind"] == "release"}
        assert {sha256_bytes(data) for data in files} == digests
        assert metrics.by_domain[domain] in [DomainEvaluation.model_validate_json(data).metrics for data in files]
    manifest = rounds.find_manifest(Workspace(ref), 0)
    assert manifest is not None
    assert manifest.summary.metrics == metrics == summary.rounds[0].metrics
    assert manifest.samples == ()
    assert all(one.metrics.toxicity_max is None for one in summary.rounds)

    numbers = means | {x for row in exact for x in (row.bertscore_f1, row.rouge_l, row.toxicity)}
    needles = {repr(x)[:12].encode() for x in numbers if len(repr(x)) > 14}
    needles |= {row.output.encode() for row in exact if len(row.output) > 20}
    needles |= {row.reference.encode() for row in exact}
    assert len(exact) > 20
    assert len(needles) > 20
    written = b"\n".join(path.read_bytes() for path in sorted(Path(ref.out_dir).rglob("*")) if path.is_file())
    assert any(needle in written for needle in needles) == sabotaged


def _entries(store: Path, account: str) -> list[dict]:
    return [json.loads(path.read_bytes()) for path in sorted((store / "ledgers" / account).glob("*.json"))]


def test_scorers_are_looked_for_before_the_charge(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UtilityScorer, "__init__", die)
    with pytest.raises(Exception, match="DeathError"):
        rounds.evaluate(workspace, adapters(workspace, 1)[0], "one", "gate")
    assert kinds(workspace) == []


def test_every_private_batch_has_one_shape(
    private_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a neighbour would decide how a row is padded, and with it, by rounding, what is written for the row."""
    private_study["evaluation"]["batch_size"] = 4
    workspace = opened(private_study, tmp_path / "out")
    model, shapes = workspace.evaluation_model_with(workspace.initial_adapter.trained), []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: shapes.append(tuple(given["input_ids"].shape)) or generate(**given)
    )
    rounds.evaluate(workspace, adapters(workspace, 1)[0], "one", "gate")
    config = workspace.config
    assert len(shapes) > 1
    assert set(shapes) == {(4, config.backbone.max_length - config.evaluation.max_new_tokens)}


def test_noise_is_drawn_from_secret_dice(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    drawn: list[object] = []
    sample = discrete_gaussian.sample
    monkeypatch.setattr(discrete_gaussian, "sample", lambda scale, dice: drawn.append(dice) or sample(scale, dice))
    rounds.evaluate(workspace, adapters(workspace, 1)[0], "one", "gate")
    assert drawn
    assert all(type(dice) is type(discrete_gaussian.secret_dice()) for dice in drawn)
