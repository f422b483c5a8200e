"""A real grid: what is shared, what differs, what a second start does, and what must not be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.compare import comparison as comparison_module
from fedmentor_core.compare.arms import POOLED, cell_config, find_arm
from fedmentor_core.compare.budgets import check_budgets
from fedmentor_core.compare.comparison import Comparison, read_file
from fedmentor_core.compare.identity import differences, key_parts
from fedmentor_core.compare.records import Cell, CellResult, ComparisonTable
from fedmentor_core.compare.run import CellEvent, join_comparisons, run_comparison
from fedmentor_core.compare.settings import CompareSettings
from fedmentor_core.compare.timing import estimate_time, refuse_too_long
from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import BudgetError, ConfigError, FedMentorError, OutputExistsError
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.storage.local import LocalStore


def results(made: Comparison) -> dict[str, CellResult]:
    found = {str(cell): made.result(cell) for cell in made.cells}
    return {name: result for name, result in found.items() if result is not None}


def rerun(made: Comparison) -> tuple[ComparisonTable, list[str]]:
    """Start again; the table, and what happened to each cell."""
    said: list[str] = []
    table = run_comparison(made, lambda event: said.append(event.what) if isinstance(event, CellEvent) else None)
    return table, said


def test_every_cell_has_a_result_and_every_form_of_the_table_is_there(grid: Comparison) -> None:
    assert len(results(grid)) == len(grid.cells) == 7 * 2 + 1
    table = ComparisonTable.model_validate_json((grid.out / "table.json").read_text(encoding="utf-8"))
    assert [arm.name for arm in table.arms] == list(grid.settings.arms)
    assert all(arm.seeds == (3, 4) for arm in table.arms)
    assert {one.against for one in table.differences} == {"federated"}
    assert [point.epsilon for point in table.frontier] == [2.0, 4.0, None]
    assert "<html" in (grid.out / "compare.html").read_text(encoding="utf-8")
    assert (grid.out / "table.csv").is_file()
    assert (grid.out / "table.md").is_file()


def test_all_cells_share_splits_rows_and_the_untrained_scores(grid: Comparison) -> None:
    found = results(grid)
    assert len({result.identity.model_dump_json() for result in found.values()}) == 1
    assert found["base, seed 3"].final == found["base, seed 4"].final
    prompts = {tuple((one.domain, one.post) for one in result.samples) for result in found.values()}
    assert len(prompts) == 1, "the same prompts in every arm"
    assert len(list((grid.out / "untrained" / "store").rglob("test-*.json"))) == 2, "scored once a domain"


def test_seeds_give_other_adapters_and_the_same_seed_the_same_start(grid: Comparison) -> None:
    def adapters(name: str) -> set[str]:
        cell = next(cell for cell in grid.cells if str(cell) == name)
        return {path.name for path in (grid.out / "cells" / cell.key / "store").rglob("adapters/*.safetensors")}

    one, other = adapters("local, seed 3"), adapters("federated, seed 3")
    assert len(one & other) >= 2, "frozen factors and untrained adapter of the seed"
    assert len(adapters("federated, seed 3") & adapters("federated, seed 4")) <= 1, "the zeros of B at most"


def test_private_cells_have_accounts_of_their_own_and_the_others_none(grid: Comparison) -> None:
    for cell in grid.cells:
        result = results(grid)[str(cell)]
        store = LocalStore(grid.out / "cells" / cell.key / "store")
        charges = [e for name in ("one", "two") for e in Ledger(store, name).entries() if e.kind == "charge"]
        if find_arm(cell.arm).private:
            assert len(charges) == 2 * grid.config.rounds
            assert set(result.epsilon_spent) == {"one", "two"}
            assert not any(entry.seeded for entry in charges)
        else:
            assert charges == []
            assert result.epsilon_spent == {}
    budgets = {cell.arm: {c.domain: c.epsilon_budget for c in results(grid)[str(cell)].rounds[-1].clients}
               for cell in grid.cells if find_arm(cell.arm).private and cell.epsilon is None}  # fmt: skip
    assert budgets == {
        "uniform": {"one": 4.0, "two": 4.0},
        "fedmentor-fixed": {"one": 8.0, "two": 4.0},
        "fedmentor": {"one": 8.0, "two": 4.0},
    }


def test_noise_is_new_in_every_cell(grid: Comparison) -> None:
    updates = [
        sha256_bytes(path.read_bytes())
        for cell in grid.cells
        if find_arm(cell.arm).private
        for path in (grid.out / "cells" / cell.key / "store").rglob("update-*.safetensors")
    ]
    assert len(updates) == len(set(updates)) == 7 * 2 * 2


def test_one_client_holds_all_units_and_takes_the_summed_batch(grid: Comparison) -> None:
    pooled, federated = (results(grid)[f"{name}, seed 3"].rounds[0] for name in ("centralized", "federated"))
    assert [client.domain for client in pooled.clients] == [POOLED]
    assert pooled.clients[0].n_units == sum(client.n_units for client in federated.clients)
    expected = [client.sample_rate * client.n_units for client in (*pooled.clients, *federated.clients)]
    assert expected == pytest.approx([8.0, 4.0, 4.0])
    assert pooled.bytes_total == 0
    assert set(results(grid)["local, seed 3"].final.by_domain) == {"one", "two"}


def test_the_key_is_the_digest_of_what_is_written_beside_the_result(grid: Comparison) -> None:
    for cell in grid.cells:
        assert sha256_bytes((grid.out / "cells" / cell.key / "cell.json").read_bytes()).startswith(cell.key)
    assert len({cell.key for cell in grid.cells}) == len(grid.cells)
    assert read_file(grid.out).cells == grid.cells


def test_a_second_start_runs_nothing_and_gives_the_same_table(grid: Comparison) -> None:
    before = {path: path.read_bytes() for path in (grid.out / "cells").rglob("result.json")}
    first = json.loads((grid.out / "table.json").read_text(encoding="utf-8"))
    table, said = rerun(Comparison.open(grid.config, grid.settings, grid.out))
    assert said == ["reused"] * len(grid.cells)
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads(table.model_dump_json()) | {"command": ""} == first | {"command": ""}


def test_more_seeds_run_only_what_is_new(grid: Comparison, tmp_path: Path) -> None:
    settings = grid.settings.model_copy(update={"arms": ("base", "federated"), "seeds": 3, "budgets": ()})
    made = Comparison.open(grid.config, settings, tmp_path / "out")
    assert made.adopt([grid.out]) == 4
    _, said = rerun(made)
    assert said == ["reused"] * 4 + ["started", "done"] * 2
    assert not (tmp_path / "out" / "cells" / made.cells[0].key / "store").exists(), "only the two files are taken"


def test_a_changed_file_is_not_taken_for_a_result(grid: Comparison, tmp_path: Path) -> None:
    made = Comparison.open(grid.config, grid.settings.model_copy(update={"arms": ("federated",)}), tmp_path / "out")
    made.adopt([grid.out])
    cell = made.cells[0]
    path = made.out / "cells" / cell.key / "result.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    path.write_text(json.dumps(raw | {"seed": 99}), encoding="utf-8")
    with pytest.raises(FedMentorError, match="another cell"):
        made.result(cell)


def test_a_failing_cell_does_not_lose_the_others(
    grid: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a sentence of a post"

    def explode(*_: Any) -> Any:
        raise ValueError(secret)

    settings = CompareSettings(arms=("base", "local", "federated"), seeds=1, budgets=())
    made = Comparison.open(grid.config, settings, tmp_path / "out")
    monkeypatch.setattr(comparison_module, "PROCEDURES", {**comparison_module.PROCEDURES, "alone": explode})
    table, said = rerun(made)
    assert said == ["started", "done", "started", "failed", "started", "done"]
    assert [arm.name for arm in table.arms] == ["base", "federated"]
    assert [(one.arm, one.reason) for one in table.failures] == [("local", "failed with ValueError")]
    assert secret not in (made.out / "table.md").read_text(encoding="utf-8")
    monkeypatch.undo()
    _, said = rerun(Comparison.open(grid.config, settings, made.out))
    assert said == ["reused", "started", "done", "reused"], "the failed cell alone is tried again"


def test_a_client_that_fails_fails_its_cell_and_no_round_is_committed_without_it(
    small_raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmentor_core import client_round

    original = client_round._train

    def explode(workspace: Any, assignment: Any, *rest: Any) -> Any:
        if assignment.domain == "two":
            raise ValueError
        return original(workspace, assignment, *rest)

    config = validate_config({**small_raw, "execution": {"client_retries": 0}})
    settings = CompareSettings(arms=("federated",), seeds=1, budgets=())
    monkeypatch.setattr(client_round, "_train", explode)
    made = Comparison.open(config, settings, tmp_path / "out")
    table, _ = rerun(made)
    assert [one.reason for one in table.failures] == ["round 0: client 'two' failed: failed with ValueError"]
    assert not list(made.out.rglob("manifest.json"))


# --- what must not be compared ---------------------------------------------------------------------------------------


def other(raw: dict[str, Any], **changes: Any) -> StudyConfig:
    return validate_config({**raw, **changes})


def test_a_folder_of_another_configuration_is_refused(grid: Comparison, small_raw: dict[str, Any]) -> None:
    with pytest.raises(OutputExistsError, match="another configuration"):
        Comparison.open(other(small_raw, rounds=1), grid.settings, grid.out)


def test_cells_of_other_splits_are_refused_by_name(grid: Comparison, small_raw: dict[str, Any], tmp_path: Path) -> None:
    config = other(small_raw, data={"split_seed": 1})
    settings = CompareSettings(arms=("base",), against="base", seeds=1, budgets=())
    made = Comparison.open(config, settings, tmp_path / "out")
    with pytest.raises(ConfigError) as refused:
        made.adopt([grid.out])
    assert "splits.one:" in str(refused.value)
    run_comparison(made)
    with pytest.raises(ConfigError, match=r"splits\.one"):
        join_comparisons([grid.out, made.out], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_tables_of_the_same_identity_join(grid: Comparison, tmp_path: Path) -> None:
    settings = grid.settings.model_copy(update={"arms": ("federated",), "seeds": 1, "budgets": ()})
    part = Comparison.open(grid.config, settings, tmp_path / "part")
    part.adopt([grid.out])
    run_comparison(part)
    joined = join_comparisons([part.out, grid.out], tmp_path / "joined")
    whole = ComparisonTable.model_validate_json((grid.out / "table.json").read_text(encoding="utf-8"))
    assert joined.arms == whole.arms
    assert joined.differences == whole.differences
    with pytest.raises(OutputExistsError):
        join_comparisons([part.out], tmp_path / "joined")
    with pytest.raises(ConfigError, match="holds no comparison"):
        join_comparisons([tmp_path], tmp_path / "more")


def test_one_cell_with_two_settings_is_not_joined(grid: Comparison, small_raw: dict[str, Any], tmp_path: Path) -> None:
    config = other(small_raw, training={**small_raw["training"], "learning_rate": 0.5})
    settings = CompareSettings(arms=("federated",), seeds=1, budgets=())
    made = Comparison.open(config, settings, tmp_path / "out")
    run_comparison(made)
    with pytest.raises(ConfigError, match=r"training\.learning_rate: 0\.5 / 0\.005"):
        join_comparisons([grid.out, made.out], tmp_path / "joined")


# --- the key ------------------------------------------------------------------------------------------------------------


def parts(grid: Comparison, config: StudyConfig, arm: str = "fedmentor") -> dict[str, Any]:
    derived = cell_config(config, find_arm(arm), config.seed)
    return key_parts(Cell(arm=arm, seed=config.seed), derived, grid.identity)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rounds": 3}, "rounds"),
        ({"adapter": {"rank": 4, "alpha": 8.0}}, "adapter.rank"),
        ({"privacy": {"clip_norm": 0.1}}, "privacy.clip_norm"),
        ({"adaptation": {"gamma": 0.5}}, "privacy.adaptation.gamma"),
        ({"aggregation": {"weights": "units"}}, "aggregation.weights"),
        ({"data": {"split_seed": 9}}, "data.split_seed"),
    ],
)
def test_the_key_changes_with_what_decides_the_result(
    grid: Comparison, small_raw: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    found = differences(parts(grid, grid.config), parts(grid, other(small_raw, **changes)))
    assert named in [line.split(":")[0] for line in found]


def test_the_key_does_not_change_with_names_paths_and_places(grid: Comparison, small_raw: dict[str, Any]) -> None:
    evaluation = {**small_raw["evaluation"], "thresholds": [], "bertscore": {"batch_size": 4}}
    places = {
        "name": "renamed",
        "data": {"root": "elsewhere", "digest_key_variable": "OTHER"},
        "storage": {"url": "s3://bucket/x"},
        "privacy": {"ledger_url": "file:///ledgers"},
        "execution": {"torch_threads": 1},
        "evaluation": evaluation,
        "backbone": {"name": "moved", "max_length": 160},
    }
    assert parts(grid, other(small_raw, **places)) == parts(grid, grid.config)


def test_without_privacy_budgets_decide_nothing(grid: Comparison, small_raw: dict[str, Any]) -> None:
    changed = other(small_raw, privacy={"clip_norm": 0.1}, adaptation={"gamma": 0.5})
    assert parts(grid, changed, "federated") == parts(grid, grid.config, "federated")
    assert parts(grid, grid.config, "federated") != parts(grid, grid.config, "local")


# --- before it starts ---------------------------------------------------------------------------------------------------


def test_a_grid_that_takes_too_long_is_refused_with_the_estimate(grid: Comparison, tmp_path: Path) -> None:
    settings = grid.settings.model_copy(update={"max_minutes": 1e-4})
    made = Comparison.open(grid.config, settings, tmp_path / "out")
    found = estimate_time(made)
    assert found.n_cells == len(made.cells)
    assert found.seconds > 0
    with pytest.raises(ConfigError) as refused:
        refuse_too_long(made, found)
    for word in ("max_minutes is 0.0001", "15 cells", "Lower seeds (now 2)", "steps_per_round"):
        assert word in str(refused.value)
    assert not made.out.exists(), "nothing was started"
    refuse_too_long(Comparison.open(grid.config, grid.settings, tmp_path / "out"), found)  # no limit, no refusal
    assert estimate_time(grid).seconds == 0.0, "a finished grid takes no time"


def test_budgets_that_cannot_carry_the_rounds_are_refused_all_at_once(grid: Comparison, tmp_path: Path) -> None:
    settings = grid.settings.model_copy(update={"budgets": (1e-4, 2e-4, 2.0)})
    made = Comparison.open(grid.config, settings, tmp_path / "out")
    with pytest.raises(BudgetError) as refused:
        check_budgets(made)
    assert "uniform at epsilon 0.0001" in str(refused.value)
    assert "uniform at epsilon 0.0002" in str(refused.value)
    assert "uniform at epsilon 2:" not in str(refused.value)
    assert not made.out.exists()


def test_the_planned_loss_is_what_the_cells_then_spent(grid: Comparison) -> None:
    planned = check_budgets(grid)
    spent = {
        domain: sum(result.epsilon_spent.get(domain, 0.0) for result in results(grid).values())
        for domain in ("one", "two")
    }
    assert planned.n_cells == 7
    for domain, epsilon in planned.epsilon.items():
        # noise that was adapted spends more than planned, and never more than the budgets
        assert spent[domain] >= 0.98 * epsilon
    assert spent["one"] <= 2 * (4 + 8 + 8) + 2
    assert spent["two"] <= 2 * (4 + 4 + 4) + 2
