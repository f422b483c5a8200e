"""A site's client in a process of its own: under the site's own file, with the site's ledger, and an answer that counts."""

import pytest

from fedmentor_core import isolation
from fedmentor_core.rounds import RoundState, assignments_for
from fedmentor_core.site.asking import ask_training


@pytest.mark.slow
def test_a_client_at_a_site_trains_apart_on_a_gpu_and_answers_as_ever(server, sites, tmp_path, monkeypatch):
    started = []
    original = isolation._process
    monkeypatch.setattr(isolation, "visible_gpus", lambda device: ("0",))
    monkeypatch.setattr(
        isolation, "_process", lambda training, slot: started.append(training) or original(training, slot)
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assignment = next(one for one in assignments_for(server, RoundState.first(server)) if one.domain == "one")
    update = ask_training(server, assignment, sites.deliver)
    assert update.status == "trained"
    assert [training.kind for training in started] == ["site"]
    ledger = sites.folder / "site-a" / "ledger" / "ledgers" / "one"
    assert len(list(ledger.iterdir())) == 3, "plan, charge, release, in the site's own ledger"
