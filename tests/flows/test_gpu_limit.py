"""The Prefect limit of a site's GPU: strict, held while a client trains, given back."""

import pytest


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory):
    """A throw-away Prefect server and database."""
    from prefect_harness import throwaway_prefect

    with throwaway_prefect():
        yield


def active(name: str) -> int:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(name).active_slots


def make_limit(name: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))


@pytest.mark.slow
def test_the_limit_is_held_and_given_back_also_after_a_failure(prefect_server):
    from tasks.gpu_slots import prefect_slot

    def fail() -> None:
        with prefect_slot("gpu-site-a"):
            assert active("gpu-site-a") == 1
            raise ZeroDivisionError

    make_limit("gpu-site-a")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert active("gpu-site-a") == 0


@pytest.mark.slow
def test_a_limit_that_does_not_exist_stops_the_client_before_it_is_charged(prefect_server, tiny_study, tmp_path):
    from fedmentor_core.config_io import validate_config
    from fedmentor_core.errors import ConfigError
    from fedmentor_core.rounds import RoundState, assignments_for
    from fedmentor_core.study_ref import open_study
    from fedmentor_core.workspace import workspace_of
    from tasks.client_training import train_client

    tiny_study["execution"] = {"gpu_limit": "gpu-nowhere"}
    ref = open_study(validate_config(tiny_study), tmp_path / "out")
    workspace = workspace_of(ref)
    assignment = assignments_for(workspace, RoundState.first(workspace))[0]
    with pytest.raises(ConfigError, match="prefect gcl create gpu-nowhere --limit 1"):
        train_client(ref, assignment)
    assert workspace.ledger("one").entries() == []


@pytest.mark.slow
def test_a_client_holds_its_limit_while_it_trains_and_not_after(prefect_server, tiny_study, tmp_path):
    from fedmentor_core.config_io import validate_config
    from fedmentor_core.rounds import RoundState, assignments_for
    from fedmentor_core.study_ref import open_study
    from fedmentor_core.workspace import workspace_of
    from tasks.client_training import train_client
    from tasks.listening import listening

    make_limit("gpu-here")
    tiny_study["execution"] = {"gpu_limit": "gpu-here"}
    ref = open_study(validate_config(tiny_study), tmp_path / "out")
    workspace = workspace_of(ref)
    assignment = assignments_for(workspace, RoundState.first(workspace))[0]
    seen = []
    with listening(lambda event: seen.append(active("gpu-here"))):
        assert train_client(ref, assignment).status == "trained"
    assert set(seen) == {1}
    assert active("gpu-here") == 0


def test_a_worker_is_told_the_limit_by_its_environment(monkeypatch):
    from tasks.gpu_slots import gpu_limit_of_environment

    monkeypatch.delenv("FEDMENTOR_GPU_LIMIT", raising=False)
    assert gpu_limit_of_environment() is None
    monkeypatch.setenv("FEDMENTOR_GPU_LIMIT", "gpu-site-a")
    assert gpu_limit_of_environment() == "gpu-site-a"
