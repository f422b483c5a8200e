"""Turns at the evaluating model: who may write, and when GPU memory goes back. No GPU is needed: calls are watched."""

import threading

import pytest
import torch

from fedmentor_core import rounds
from fedmentor_core.config_io import validate_config
from fedmentor_core.evaluation import scores
from fedmentor_core.evaluation.turn import turn
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace


@pytest.fixture
def handed_back(monkeypatch):
    """At each call to hand memory back, whether the watched lock was held."""
    lock, calls = threading.Lock(), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(lock.locked()))
    return lock, calls


def test_memory_goes_back_when_the_model_has_written_and_again_at_the_end(handed_back):
    lock, calls = handed_back
    with turn(lock) as on_written:
        assert lock.locked()
        assert calls == []
        on_written()
        assert not lock.locked()
        assert calls == [True]  # before the next one allocates
        with turn(lock):  # another evaluation writes meanwhile
            on_written()  # said twice: the other's turn is not touched
            assert lock.locked()
    assert len(calls) == 4


def test_a_failure_ends_the_turn(handed_back):
    lock, calls = handed_back
    with pytest.raises(ValueError, match="no"), turn(lock):
        raise ValueError("no")
    assert not lock.locked()
    assert calls == [True, False]


@pytest.mark.parametrize("gate_data", ["public", "private"])
def test_scorers_work_outside_the_turn(tiny_study, tmp_path, monkeypatch, gate_data):
    """The model is free for the next domain while outputs are scored; it was not while they were written."""
    tiny_study["evaluation"]["gate_data"] = gate_data
    if gate_data == "private":
        tiny_study["evaluation"] |= {"private": {"epsilon": 8.0}, "max_gate_examples": 100}
    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    held: dict[str, bool] = {}

    def watched(name, function):
        def watching(*args, **options):
            held[name] = workspace.evaluation_lock.locked()
            return function(*args, **options)

        return watching

    monkeypatch.setattr(scores, "generate", watched("generate", scores.generate))
    monkeypatch.setattr(scores, "log_losses", watched("log_losses", scores.log_losses))
    scorers = workspace.scorers
    monkeypatch.setattr(type(scorers.utility), "score", watched("utility", type(scorers.utility).score))
    monkeypatch.setattr(type(scorers.toxicity), "score", watched("toxicity", type(scorers.toxicity).score))
    rounds.evaluate(workspace, workspace.untrained_adapter, "one", "gate")
    written = {"generate": True} | ({"log_losses": True} if gate_data == "public" else {})
    assert held == written | {"utility": False, "toxicity": False}
