"""The benchmark harness itself: its arithmetic, its contract, and that one arm's failure loses no other's figures."""

import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import run as bench_run  # noqa: E402
from harness import ArmResult, Finding, Plan, Ratio, Sample, Scale, discover  # noqa: E402
from harness.measure import measure  # noqa: E402
from harness.plan import Benchmark  # noqa: E402
from harness.results import ratios_of, spread_of  # noqa: E402

TINY = """
import os, sys
from harness import Arm, Plan, Ratio, Sample, SkipArmError, benchmark

@benchmark("tiny", title="a tiny one", minutes=0.01)
def tiny(scale):
    arms = [Arm("small", grow, {"n_bytes": 2**20}), Arm("large", grow, {"n_bytes": 64 * 2**20}),
            Arm("raises", fails, {"how": "raise"}), Arm("dies", fails, {"how": "die"}),
            Arm("hangs", fails, {"how": "hang"}, limit_seconds=1.0), Arm("absent", fails, {"how": "skip"})]
    return Plan(arms, [Ratio("memory", of="large", to="small", what="growth_bytes", at_most=1.0),
                       Ratio("lost", of="raises", to="small")], turns=2, fresh=scale.quick,
                notes=["a note"], conclude=lambda samples: samples["dies"])

def grow(n_bytes):
    def turn():
        print("what an arm prints is no answer")
        block = bytearray(os.urandom(1024)) * (n_bytes // 1024)
        return Sample(seconds=n_bytes / 2**20, bytes=len(block), figures={"mb_per_second": 3.0})
    return turn

def fails(how):
    if how == "skip":
        raise SkipArmError("no such thing here")
    def turn():
        if how == "raise":
            raise ValueError("broken on purpose")
        if how == "die":
            sys.stderr.write("last words")
            sys.stderr.flush()
            os._exit(7)
        import time
        time.sleep(60)
    return turn
"""


@pytest.fixture
def tiny_folder(tmp_path, monkeypatch):
    (tmp_path / "bench_tiny_for_test.py").write_text(TINY, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("harness.plan._registered", {})
    yield tmp_path
    sys.modules.pop("bench_tiny_for_test", None)


@pytest.mark.parametrize("quick", [False, True])
def test_a_tiny_benchmark_from_the_command_to_the_files(tiny_folder, tmp_path, capsys, quick):
    out = tmp_path / "out"
    code = bench_run.main(["--out", str(out), *(["--quick"] if quick else [])], folder=tiny_folder)
    assert code == 1, "arms that fail are told"

    found = json.loads((out / "bench.json").read_text())
    assert set(found) == {"machine", "versions", "benchmarks"}
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["versions"]["python"].startswith("3.")
    (tiny,) = found["benchmarks"]
    assert tiny["name"] == "tiny"
    arms = {arm["name"]: arm for arm in tiny["arms"]}
    for arm in tiny["arms"]:
        assert {"name", "median_seconds", "spread", "peak_bytes", "bytes"} <= set(arm)

    assert arms["small"]["median_seconds"] == 1.0
    assert arms["large"]["median_seconds"] == 64.0
    assert arms["large"]["bytes"] == 64 * 2**20
    assert arms["large"]["figures"]["mb_per_second"] == 3.0
    assert arms["large"]["peak_bytes"] > 64 * 2**20
    assert arms["large"]["figures"]["growth_bytes"] == pytest.approx(64 * 2**20, rel=0.2)
    assert arms["small"]["turns"] == 2

    assert arms["raises"]["failed"] == "ValueError: broken on purpose"
    assert "code 7" in arms["dies"]["failed"]
    assert "last words" in arms["dies"]["failed"]
    assert "longer than 1 s" in arms["hangs"]["failed"]
    assert arms["absent"]["skipped"] == "no such thing here"
    assert arms["absent"]["failed"] is None
    assert "KeyError" in tiny["failed"], "a conclusion from an arm that did not run"
    assert set(tiny["ratios"]) == {"memory"}, "no ratio of an arm that did not run"
    assert tiny["ratios"]["memory"] > 10

    text = (out / "bench.md").read_text()
    assert "| large | 64 s | 0 ms |" in text
    assert "**missed**" in text
    assert "skipped: no such thing here" in text
    told = capsys.readouterr()
    assert "left" in told.err
    assert "FAILED tiny, raises" in told.err


def test_profile_of_a_tiny_benchmark(tiny_folder, tmp_path, capsys):
    assert bench_run.main(["--profile", "--out", str(tmp_path / "out")], folder=tiny_folder) == 0
    text = (tmp_path / "out" / "profile-tiny.md").read_text()
    assert text in capsys.readouterr().out
    large = text.split("## large")[1].split("## ")[0]
    assert "bench_tiny_for_test.py: turn`" in large
    assert "posix.urandom" in large
    assert "ValueError: broken on purpose" in text
    assert "longer than 1 s" in text
    assert "no such thing here" in text


def test_help_lists_the_benchmarks_with_an_example(tiny_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_run.main(["--help"], folder=tiny_folder)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "a tiny one" in shown
    assert "--only startup --quick" in shown


def test_a_name_that_is_none_and_a_gpu_that_is_not_there_are_refused(tiny_folder, capsys, monkeypatch):
    assert bench_run.main(["--only", "none"], folder=tiny_folder) == 2
    assert "there are tiny" in capsys.readouterr().err
    monkeypatch.setattr(bench_run, "gpu_name", lambda: None)
    assert bench_run.main(["--gpu"], folder=tiny_folder) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_medians_and_spreads():
    samples = [Sample(seconds=value, peak_bytes=10, figures={"x": value}) for value in (5.0, 1.0, 2.0, 4.0, 3.0)]
    found = ArmResult.of("arm", [*samples])
    assert (found.median_seconds, found.spread, found.peak_bytes, found.bytes) == (3.0, 2.0, 10, None)
    assert found.figures == {"x": 3.0}
    assert spread_of([7.0]) == 0.0


def test_a_ratio_is_of_arms_in_the_same_turn():
    """A machine that gets slower over the turns must not show in the ratio."""
    slow = [Sample(seconds=2.0 * drift) for drift in (1.0, 5.0, 9.0)]
    fast = [Sample(seconds=1.0 * drift) for drift in (1.0, 5.0, 9.0)]
    plan = Plan((), [Ratio("slower", of="slow", to="fast", at_most=1.5), Ratio("gone", of="none", to="fast")])
    (found,) = ratios_of(plan, {"slow": slow, "fast": fast})
    assert (found.name, found.value, found.met) == ("slower", 2.0, False)


def test_targets():
    assert Finding("a", 1.0).met is None
    assert Finding("a", 1.0, at_most=1.0).met
    assert not Finding("a", 0.9, at_least=1.0).met


def test_a_plan_that_raises_is_a_result():
    def broken(scale: Scale) -> Plan:
        raise OSError("no disk")

    found = measure(Benchmark("b", "t", broken, 1.0, False, True), Scale(), lambda what, done: None)
    assert found.problems == ["b: OSError: no disk"]


def test_the_real_benchmarks_are_found_and_can_be_planned():
    """Planning starts nothing; a ratio of an arm that is not there would show here and not after twenty minutes."""
    found = discover(BENCHMARKS)
    assert {"aggregation", "orchestration", "startup", "scale-ledger"} <= {one.name for one in found}
    for one in found:
        for scale in (Scale(), Scale(quick=True)):
            plan = one.plan(scale)
            names = [arm.name for arm in plan.arms]
            assert len(set(names)) == len(names)
            assert {name for ratio in plan.ratios for name in (ratio.of, ratio.to)} <= set(names)
            json.dumps([dict(arm.settings) for arm in plan.arms])
