"""What each arm cost: bytes that crossed the wire per round, and time."""

from fedmentor_core.compare.records import ComparisonTable
from fedmentor_core.report import words
from fedmentor_core.report.compare.arms import Arms
from fedmentor_core.report.compare.bars import ArmBar, arm_bars
from fedmentor_core.report.plots import Figure


def figures(table: ComparisonTable, arms: Arms) -> list[Figure]:
    """Bytes and seconds by arm."""
    traffic = [ArmBar(arm.name, arms.slot(arm.name), float(arm.bytes_per_round)) for arm in table.arms]
    seconds = [ArmBar(arm.name, arms.slot(arm.name), arm.seconds) for arm in table.arms]
    traffic_chart = arm_bars(traffic, alt="Traffic per round by arm.", show=words.show_bytes)
    time_chart = arm_bars(seconds, alt="Time per run by arm.", show=words.show_seconds)
    found = [
        Figure("Traffic per round", "Adapter bytes of all clients, up and down.", traffic_chart),
        Figure("Time per run", "Median over seeds, evaluation included.", time_chart),
    ]
    return [figure for figure in found if figure.svg]
