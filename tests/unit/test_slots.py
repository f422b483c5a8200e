"""Slots: never two holders of one, in any process, and free again the moment a holder is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedmentor_core.config import ExecutionConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from fedmentor_core.slots import held_gpu, held_slot, visible_gpus

PROGRAM = """
import sys, time
from fedmentor_core.config_io import validate_config
from fedmentor_core.slots import held_slot
folder, mode, gpus = sys.argv[1], sys.argv[2], tuple(sys.argv[3].split(",")) if sys.argv[3] else ()
config = validate_config({
    "name": "s", "domains": [{"name": "a", "source": {"kind": "invented", "corpus": "CORPUS", "n_units": 9}, "epsilon": 1}],
    "evaluation": {"gate_data": "public"}, "execution": {"slots_per_machine": 2, "slots_folder": folder},
})
if mode == "hold":
    with held_slot(config, gpus) as slot:
        print(slot.name, flush=True)
        time.sleep(600)
with open(sys.argv[4], "ab", buffering=0) as log:
    for _ in range(25):
        with held_slot(config, gpus) as slot:
            log.write(f"+{slot.name}\\n".encode())
            time.sleep(0.002)
            log.write(f"-{slot.name}\\n".encode())
"""


@pytest.fixture
def config(tiny_study, tmp_path):
    return validate_config(
        tiny_study | {"execution": {"slots_per_machine": 2, "slots_folder": str(tmp_path / "slots")}}
    )


def start(config, mode: str, gpus: str = "", *more: str) -> subprocess.Popen:
    from fedmentor_core.data import invented

    program = PROGRAM.replace("CORPUS", next(iter(invented.CORPORA)))
    command = [sys.executable, "-c", program, config.execution.slots_folder, mode, gpus, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class TakenError(Exception):
    pass


def refuse() -> None:
    raise TakenError


def test_as_many_as_there_are_and_no_more(config):
    with held_slot(config, ()) as first, held_slot(config, ()) as second:
        assert {first.name, second.name} == {"client-0", "client-1"}
        assert first.gpu is None
        with pytest.raises(TakenError), held_slot(config, (), refuse):
            pytest.fail("a third holder of two slots")
    with held_slot(config, (), refuse) as again:
        assert again.name == "client-0"


def test_gpus_are_the_slots_where_there_are_any(config):
    gpus = ("GPU-5f", "1")
    with held_slot(config, gpus) as first, held_slot(config, gpus) as second:
        assert (first.gpu, second.gpu) == gpus
        with pytest.raises(TakenError), held_slot(config, gpus[:1], refuse):
            pytest.fail("two clients on one GPU")


def test_nothing_is_limited_where_nothing_is_said(tiny_study, tmp_path):
    config = validate_config(tiny_study | {"execution": {"slots_folder": str(tmp_path / "slots")}})
    with held_slot(config, (), refuse) as slot, held_gpu(config, refuse):
        assert slot is None
    assert not (tmp_path / "slots").exists()


def test_a_killed_holder_frees_its_slot_at_once(config):
    holder = start(config, "hold", "0")
    try:
        assert holder.stdout.readline().strip() == "gpu-0"
        with pytest.raises(TakenError), held_slot(config, ("0",), refuse):
            pytest.fail("held by another process")
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        with held_slot(config, ("0",), refuse) as slot:  # refuse: not a moment of waiting
            assert slot.gpu == "0"
    finally:
        holder.kill()
        holder.stdout.close()


def test_the_slot_stays_taken_while_a_process_that_inherited_it_lives(config):
    with held_slot(config, ("0",)) as slot:
        heir = subprocess.Popen(["sleep", "600"], pass_fds=(slot.descriptor,))
    try:
        with pytest.raises(TakenError), held_slot(config, ("0",), refuse):
            pytest.fail("the heir may still be on the GPU")
        heir.kill()
        heir.wait(30)
        with held_slot(config, ("0",), refuse) as again:
            assert again.gpu == "0"
    finally:
        heir.kill()


@pytest.mark.slow
def test_processes_that_race_never_hold_the_same_slot(config, tmp_path):
    """Every holder writes down when it comes and goes; whatever the order, nobody comes where somebody is."""
    log = tmp_path / "log"
    racers = [start(config, "race", "0,1", str(log)) for _ in range(4)]
    for racer in racers:
        assert racer.wait(120) == 0
        racer.stdout.close()
    inside: set[str] = set()
    lines = log.read_text().split()
    for line in lines:
        if line[0] == "+":
            assert line[1:] not in inside
            inside.add(line[1:])
        else:
            inside.remove(line[1:])
    assert len(lines) == 4 * 25 * 2
    assert {line[1:] for line in lines} == {"gpu-0", "gpu-1"}


def test_a_wait_ends_when_the_slot_is_free(config):
    waits = []

    def on_wait() -> None:
        waits.append(1)
        holder.kill()
        holder.wait(30)

    holder = start(config, "hold", "0")
    holder.stdout.readline()
    with held_slot(config, ("0",), on_wait) as slot:
        assert slot.gpu == "0"
    holder.stdout.close()
    assert len(waits) == 1


def test_a_folder_that_cannot_be_used_is_an_error(tiny_study, tmp_path):
    (tmp_path / "file").write_text("")
    config = validate_config(
        tiny_study | {"execution": {"slots_per_machine": 1, "slots_folder": str(tmp_path / "file" / "slots")}}
    )
    with pytest.raises(ConfigError, match="slots_folder"), held_slot(config, ()):
        pytest.fail("held in no folder")


def test_a_link_in_the_folder_is_not_followed(config, tmp_path):
    folder = Path(config.execution.slots_folder)
    folder.mkdir()
    (folder / "gpu-0.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError), held_slot(config, ("0",)):
        pytest.fail("followed a link")
    assert not (tmp_path / "elsewhere").exists()


def test_everybody_on_the_machine_may_use_the_files(config):
    before = os.umask(0o077)
    try:
        with held_slot(config, ("0",)):
            pass
    finally:
        os.umask(before)
    folder = Path(config.execution.slots_folder)
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert (folder / "gpu-0.lock").stat().st_mode & 0o777 == 0o666


def test_gpus_are_named_as_cuda_names_them(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus("auto") == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-77")
    assert visible_gpus("cuda") == ("3", "GPU-77")
    assert visible_gpus("cpu") == ()


@pytest.mark.parametrize("bad", [{"ray_address": "auto"}, {"gpus_per_client": 1}, {"shared_folders": True}])
def test_what_is_for_ray_needs_ray(bad):
    with pytest.raises(ValueError, match="task_runner must be 'ray'"):
        ExecutionConfig(**bad)
    made = ExecutionConfig(task_runner="ray", **bad)
    assert ExecutionConfig.model_validate(made.model_dump()) == made
    assert ExecutionConfig.model_validate(ExecutionConfig().model_dump()) == ExecutionConfig()
