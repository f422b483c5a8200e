"""Threads or a cluster, by configuration; a cluster that could not work is refused before anything is charged."""

from types import SimpleNamespace

import pytest

from fedmentor_core.config import ExecutionConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from flows import task_runners


def ray_study(study: dict, **execution) -> dict:
    return study | {"execution": {"task_runner": "ray", **execution}}


def test_threads_are_as_many_as_clients_and_those_that_wait_for_sites():
    runner = task_runners.thread_runner(ExecutionConfig(max_parallel_clients=3), waiting=2)
    assert runner._max_workers == 5


@pytest.mark.parametrize(
    ("setting", "runner", "n_gpus", "n_sites", "expected"),
    [
        ("auto", "threads", 0, 0, False),
        ("auto", "threads", 1, 0, False),
        ("auto", "threads", 2, 0, True),
        ("auto", "ray", 0, 0, True),
        ("always", "threads", 0, 0, True),
        ("never", "ray", 2, 0, False),
        ("always", "threads", 2, 1, False),
    ],
)
def test_rounds_overlap_where_evaluation_leaves_machines_free(monkeypatch, setting, runner, n_gpus, n_sites, expected):
    monkeypatch.setattr(task_runners, "visible_gpus", lambda device: tuple(map(str, range(n_gpus))))
    execution = ExecutionConfig(overlap_rounds=setting, task_runner=runner)
    config = SimpleNamespace(execution=execution, backbone=SimpleNamespace(device="auto"))
    workspace = SimpleNamespace(config=config, domains_at_sites=("a site",) * n_sites)
    assert task_runners.overlaps(workspace) is expected


def test_without_a_cluster_nothing_changes():
    with task_runners.machines(ExecutionConfig()), task_runners.mapped_to_machines(ExecutionConfig()):
        pass


def test_ray_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(task_runners, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'fedmentor\[ray\]'"),
        task_runners.machines(ExecutionConfig(task_runner="ray")),
    ):
        pytest.fail("no cluster")


@pytest.mark.parametrize("url", ["http://127.0.0.1:4200/api", "http://localhost:4200/api"])
def test_a_server_that_only_this_machine_reaches_is_refused_for_other_machines(url):
    own = next(iter(task_runners._own_addresses() - set(task_runners._LOOPBACK)), "127.0.0.1")
    task_runners._check_reach(url, {own, "127.0.0.1"})
    with pytest.raises(ConfigError, match=r"other machines \(198\.51\.100\.7\).*PREFECT_API_URL"):
        task_runners._check_reach(url, {own, "198.51.100.7"})
    task_runners._check_reach("https://prefect.example/api", {own, "198.51.100.7"})


@pytest.mark.parametrize(
    ("execution", "more", "problem"),
    [
        ({"ray_address": "auto"}, {}, "storage.url must be an s3:// URL, or set execution.shared_folders"),
        ({"ray_address": "auto"}, {"storage": {"url": "file:///x"}}, "storage.url must be an s3:// URL"),
        (
            {"ray_address": "ray://head:10001"},
            {"storage": {"url": "s3://b/p"}, "privacy": {"ledger_url": "file:///x"}},
            "privacy.ledger_url must be an s3:// URL",
        ),
        ({}, {"backbone": {"device": "cuda"}}, "execution.gpus_per_client is 0"),
    ],
)
def test_a_cluster_that_could_not_work_is_refused(tiny_study, execution, more, problem):
    with pytest.raises(ConfigError, match=problem):
        validate_config(ray_study(tiny_study, **execution) | more)


@pytest.mark.parametrize(
    ("execution", "more"),
    [
        ({}, {}),
        ({"ray_address": "auto", "shared_folders": True}, {}),
        ({"ray_address": "auto"}, {"storage": {"url": "s3://b/p"}}),
        ({"gpus_per_client": 1}, {"backbone": {"device": "cuda"}}),
    ],
)
def test_a_cluster_that_can_is_not(tiny_study, execution, more):
    made = validate_config(ray_study(tiny_study, **execution) | more)
    assert validate_config(made.model_dump(mode="json")) == made


def test_domains_at_sites_do_not_go_to_a_cluster(tiny_study):
    tiny_study["domains"][0] |= {"source": {"kind": "site"}, "site": "a"}
    tiny_study["sites"] = {"a": {"public_key": "0" * 64}}
    with pytest.raises(ConfigError, match="one train at their sites"):
        validate_config(ray_study(tiny_study))
