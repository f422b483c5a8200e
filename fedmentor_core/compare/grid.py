"""Which cells a comparison has, in the order in which they are run."""

from fedmentor_core.compare.arms import ARMS, Arm, cell_config, find_arm, strictest_budget
from fedmentor_core.compare.records import Cell
from fedmentor_core.compare.settings import CompareSettings
from fedmentor_core.config import StudyConfig


def plan_grid(config: StudyConfig, settings: CompareSettings) -> tuple[Cell, ...]:
    """Every arm with one seed, then with the next, and the frontier last: a grid that is cut short can be compared.

    A budget at which the arm 'uniform' is run anyway is not run again.
    """
    arms = [arm for arm in ARMS if arm.name in settings.arms]
    seeds = range(config.seed, config.seed + settings.seeds)
    cells = [Cell(arm=arm.name, seed=seed) for seed in seeds for arm in arms]
    shared = settings.frontier_arm == "uniform" and "uniform" in settings.arms
    for seed in range(config.seed, config.seed + settings.budget_seeds):
        for epsilon in sorted(settings.budgets):
            if not (shared and seed in seeds and epsilon == uniform_budget(config, settings)):
                cells.append(Cell(arm=settings.frontier_arm, seed=seed, epsilon=epsilon))
    return tuple(cells)


def uniform_budget(config: StudyConfig, settings: CompareSettings) -> float:
    """The one epsilon of the arm 'uniform'."""
    return strictest_budget(config) if settings.uniform_epsilon is None else settings.uniform_epsilon


def config_of(config: StudyConfig, settings: CompareSettings, cell: Cell) -> StudyConfig:
    """The study of a cell."""
    epsilon = cell.epsilon
    if epsilon is None and cell.arm == "uniform":
        epsilon = settings.uniform_epsilon
    return cell_config(config, find_arm(cell.arm), cell.seed, epsilon)


def steps_of(config: StudyConfig, arm: Arm) -> int:
    """Optimiser steps of a cell, each over the expected batch of one client: what its time goes by."""
    if arm.procedure == "untrained":
        return 0
    return config.rounds * config.training.steps_per_round * len(config.domains)
