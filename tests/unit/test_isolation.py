"""A client in a process of its own: the same bytes, stopped whatever it does, and what it charged stays charged."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedmentor_core import errors, isolation
from fedmentor_core.client_round import run_client
from fedmentor_core.config_io import validate_config
from fedmentor_core.discretion import WithheldError
from fedmentor_core.errors import DeadlineError, FedMentorError, IsolationError
from fedmentor_core.isolation import train_client_here
from fedmentor_core.rounds import RoundState, assignments_for
from fedmentor_core.slots import held_slot
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

pytestmark = pytest.mark.slow

SECRET = "a sentence that only the private text holds"
HANG = "sum(range(10**14))"  # a loop in C that never lets another thread run, nor a signal handler
MB = 2**20


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """One thread for each process, and no PRV diagnostic."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)


@pytest.fixture
def study(tiny_study, tmp_path):
    tiny_study["privacy"] = {"noise_seed": 5}
    tiny_study["execution"] = {
        "isolation": "process", "slots_per_machine": 1, "slots_folder": str(tmp_path / "slots"), "torch_threads": 1,
    }  # fmt: skip
    return tiny_study


def opened(study: dict, out: Path) -> Workspace:
    return Workspace(open_study(validate_config(study), out))


def asked(workspace: Workspace):
    return assignments_for(workspace, RoundState.first(workspace))[0]


def kinds(workspace: Workspace) -> list[str]:
    return [entry.kind for entry in workspace.ledger("one").entries()]


def in_every_step(monkeypatch, folder: Path, code: str) -> None:
    """Replace a training step in processes that start from now on, as Python's own ``sitecustomize`` can."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import fedmentor_core.training.client as client\ndef step(*_):\n    {code}\nclient._private_step = step\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def torch_equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def clients() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children(recursive=True) if "isolated_client" in " ".join(child.cmdline())
    ]


def refuse() -> None:
    raise AssertionError("the slot is still taken")


def test_the_same_update_as_in_this_process_and_all_memory_given_back(study, tmp_path, monkeypatch, capfd):
    """On a GPU a client has a process of its own by default, and sees that GPU alone."""
    here = opened(study, tmp_path / "here")
    expected = run_client(here, asked(here))

    monkeypatch.setattr(isolation, "visible_gpus", lambda device: ("7",))
    study["execution"]["isolation"] = "auto"
    apart = opened(study, tmp_path / "apart")
    assignment = asked(apart)
    steps, seen = [], []

    def on_step(done: int, total: int) -> None:
        steps.append((done, total))
        seen.extend(child.environ()["CUDA_VISIBLE_DEVICES"] for child in clients())

    before = psutil.Process().memory_info().rss
    update = train_client_here(apart, assignment, on_step)
    grown = psutil.Process().memory_info().rss - before

    assert torch_equal(apart.get_adapter(update.update), here.get_adapter(expected.update))
    assert steps == [(1, 2), (2, 2)]
    assert set(seen) == {"7"}
    assert kinds(apart) == ["plan", "charge", "release"]
    assert train_client_here(apart, assignment) == update, "asked again: the same record, free"
    assert clients() == []
    needed = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert needed > 150 * MB
    assert grown < 40 * MB
    assert capfd.readouterr().out == ""


def test_a_client_that_hangs_is_killed_at_its_deadline_and_stays_charged(study, tmp_path, monkeypatch):
    study["training"]["deadline_seconds"] = 10.0  # long enough to be charged on a busy machine
    workspace = opened(study, tmp_path / "out")
    assignment = asked(workspace)
    with monkeypatch.context() as patched:
        in_every_step(patched, tmp_path / "hang", HANG)
        with pytest.raises(DeadlineError, match=r"'one' passed its deadline of 10 s after 0 of 2 steps"):
            train_client_here(workspace, assignment)
    assert clients() == []
    assert kinds(workspace) == ["plan", "charge"]
    with held_slot(workspace.config, (), refuse):
        pass


def test_a_client_that_is_killed_stays_charged_and_its_retry_is_a_new_attempt(study, tmp_path):
    workspace = opened(study, tmp_path / "out")
    assignment = asked(workspace)

    def kill(done: int, total: int) -> None:
        for child in clients():
            child.send_signal(signal.SIGKILL)

    with pytest.raises(IsolationError, match=r"by signal 9 \(SIGKILL\).*ran out of memory"):
        train_client_here(workspace, assignment, kill)
    assert kinds(workspace) == ["plan", "charge"]
    update = train_client_here(workspace, assignment)
    assert update.attempt == 1
    assert kinds(workspace) == ["plan", "charge", "charge", "release"]


def test_only_the_kind_of_a_foreign_failure_crosses(study, tmp_path, monkeypatch, capfd):
    in_every_step(monkeypatch, tmp_path / "fail", f"raise ValueError({SECRET!r})")
    workspace = opened(study, tmp_path / "out")
    with pytest.raises(WithheldError) as raised:
        train_client_here(workspace, asked(workspace))
    assert str(raised.value) == "failed with ValueError"
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert "sitecustomize.py:3 in step" in said.err, "where it failed is told"
    assert kinds(workspace) == ["plan", "charge"]


def test_a_client_dies_with_its_parent_and_frees_its_slot(study, tmp_path, monkeypatch):
    """Even one that hangs: no thread of its own could run."""
    in_every_step(monkeypatch, tmp_path / "hang", HANG)
    (tmp_path / "study.json").write_text(json.dumps(study))
    program = f"""
import json
from pathlib import Path
from fedmentor_core.config_io import validate_config
from fedmentor_core.isolation import train_client_here
from fedmentor_core.rounds import RoundState, assignments_for
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace
folder = Path({str(tmp_path)!r})
workspace = Workspace(open_study(validate_config(json.loads((folder / "study.json").read_text())), folder / "out"))
train_client_here(workspace, assignments_for(workspace, RoundState.first(workspace))[0])
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        charged = tmp_path / "out" / "store" / "ledgers" / "one" / "00000001.json"
        while not charged.exists():
            assert parent.poll() is None
            time.sleep(0.1)
        orphans = psutil.Process(parent.pid).children(recursive=True)
        assert len(orphans) == 1
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(30)
        assert psutil.wait_procs(orphans, timeout=30)[1] == []
    finally:
        parent.kill()
    with held_slot(validate_config(study), (), refuse):
        pass


def test_whoever_waits_may_give_up_and_nothing_is_left_running(study, tmp_path):
    class InterruptedError(Exception):
        pass

    def give_up() -> None:
        raise InterruptedError

    workspace = opened(study, tmp_path / "out")
    with pytest.raises(InterruptedError):
        train_client_here(workspace, asked(workspace), on_wait=give_up)
    assert clients() == []
    assert kinds(workspace) == []


def test_a_client_that_does_not_load_is_stopped_before_anything_is_charged(study, tmp_path):
    study["execution"]["start_seconds"] = 0.1
    workspace = opened(study, tmp_path / "out")
    with pytest.raises(IsolationError, match=r"nothing was charged.*start_seconds"):
        train_client_here(workspace, asked(workspace))
    assert clients() == []
    assert kinds(workspace) == []


def test_our_errors_cross_by_class_and_message():
    ours = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedMentorError)]
    assert len(ours) > 10
    for kind in ours:
        raised = isolation._as_raised(kind.__name__, "what, got, allowed")
        assert type(raised) is kind
        assert str(raised) == "what, got, allowed"
    assert type(isolation._as_raised("SystemExit", "no")) is WithheldError
