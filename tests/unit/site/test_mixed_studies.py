"""Some domains here, some at sites: who waits for a site trains nothing here."""

import threading

from two_sites import at_sites

from fedmentor_core import steps
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import SiteUnavailableError
from fedmentor_core.progress import silent
from fedmentor_core.records import ArtifactRef, ClientAssignment
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace


def mixed(tiny_study: dict, sites, tmp_path, at_once: int) -> Workspace:
    """Three domains here and one at its site."""
    away = at_sites(tiny_study, sites)
    here = [tiny_study["domains"][0] | {"name": name} for name in ("here-1", "here-2", "here-3")]
    config = away | {
        "domains": [*here, away["domains"][1]],
        "sites": {"site-b": away["sites"]["site-b"]},
        "execution": {"max_parallel_clients": at_once},
        "storage": {"url": (tmp_path / "store").as_uri()},
    }
    return Workspace(open_study(validate_config(config), tmp_path / "mixed"))


def most_at_once(workspace: Workspace, monkeypatch, wanted: int) -> bool:
    """Whether ``wanted`` clients of this machine train at the same moment, with a thread for every domain."""
    together = threading.Barrier(wanted)
    met = threading.Event()

    def meet(*_):
        try:
            together.wait(0.5)
            met.set()
        except threading.BrokenBarrierError:
            pass

    monkeypatch.setattr(steps, "train_client_here", meet)
    asked = [
        ClientAssignment(
            run_id="r", round_index=0, domain=domain.name, global_adapter=ArtifactRef(key="k", sha256="", n_bytes=0),
            noise_multiplier=1.0, sample_rate=0.1, steps=1, clip_norm=1.0,
        )
        for domain in workspace.domains_here
    ]  # fmt: skip
    threads = [threading.Thread(target=steps.train_one, args=(workspace, one, silent)) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met.is_set()


def test_threads_that_wait_for_sites_do_not_become_clients_of_this_machine(tiny_study, sites, tmp_path, monkeypatch):
    workspace = mixed(tiny_study, sites, tmp_path, at_once=2)
    assert most_at_once(workspace, monkeypatch, 2), "as many as the configuration says"
    assert not most_at_once(workspace, monkeypatch, 3), "and no more"


def test_a_site_is_waited_for_without_a_turn_to_train(tiny_study, sites, tmp_path, monkeypatch):
    """All turns are taken: the site is asked all the same."""
    workspace = mixed(tiny_study, sites, tmp_path, at_once=1)
    asked = []
    monkeypatch.setattr(steps, "ask_training", lambda _, one, deliver: asked.append(one.domain))
    two = ClientAssignment(
        run_id="r", round_index=0, domain="two", global_adapter=ArtifactRef(key="k", sha256="", n_bytes=0),
        noise_multiplier=1.0, sample_rate=0.1, steps=1, clip_norm=1.0,
    )  # fmt: skip

    def deliver(*_):
        raise SiteUnavailableError("nobody is asked in this test.")

    with workspace.training_turns:
        steps.train_one(workspace, two, silent, deliver)
    assert asked == ["two"]
