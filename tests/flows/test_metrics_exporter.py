"""Metrics of a real study, served over HTTP as Prometheus reads them."""

import socket

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fedmentor_core.config import StudyConfig
from fedmentor_core.errors import ConfigError
from fedmentor_core.storage.base import open_store
from fedmentor_core.study import run_study
from fedmentor_core.study_ref import open_study
from flows.metrics_exporter import METRICS, StudyMetrics, serve_metrics


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_backbone_folder):
    from fedmentor_core.data import invented

    corpora = list(invented.CORPORA)[:2]
    folder = tmp_path_factory.mktemp("metered")
    config = StudyConfig.model_validate(
        {
            "name": "metered",
            "rounds": 1,
            "backbone": {"name": str(tiny_backbone_folder), "max_length": 160},
            "adapter": {"rank": 4, "alpha": 8.0},
            "domains": [
                {"name": name, "source": {"kind": "invented", "corpus": corpus, "n_units": 60}, "epsilon": 8.0}
                for name, corpus in zip(("one", "two"), corpora, strict=True)
            ],
            "training": {"steps_per_round": 2, "batch_size": 8, "microbatch_size": 4, "max_target_tokens": 40},
            "evaluation": {
                "gate_data": "public", "max_gate_examples": 2, "max_test_examples": 2, "max_new_tokens": 4,
                "thresholds": [{"metric": "toxicity_mean", "at_most": 1.0}],
            },
            "tracking": {"enabled": False},
        }
    )  # fmt: skip
    return run_study(open_study(config, folder))


def collected(*urls: str) -> dict[str, dict[tuple[str, ...], float]]:
    registry = CollectorRegistry()
    registry.register(StudyMetrics([open_store(url) for url in urls]))
    return {
        family.name: {tuple(sample.labels.values()): sample.value for sample in family.samples}
        for family in registry.collect()
    }


def test_metrics_say_what_the_summary_says(study):
    found = collected(study.store_url)
    assert set(found) == set(METRICS)
    round_ = study.rounds[0]
    assert found["fedmentor_store_up"] == {(study.store_url,): 1.0}
    assert found["fedmentor_rounds_committed"] == {(study.run_id,): 1.0}
    assert found["fedmentor_round_bytes"][study.run_id,] == round_.bytes_total
    assert found["fedmentor_round_seconds"][study.run_id,] == pytest.approx(round_.seconds)
    assert found["fedmentor_gate_passed"][study.run_id,] == float(round_.gate.passed)
    assert found["fedmentor_round_clients"][study.run_id, "trained"] == 2
    for client in round_.clients:
        assert found["fedmentor_client_noise_multiplier"][study.run_id, client.domain] == client.noise_multiplier
        spent = found["fedmentor_ledger_epsilon_spent"][client.domain,]
        assert spent == pytest.approx(client.epsilon_spent)
        assert found["fedmentor_client_epsilon_spent"][study.run_id, client.domain] == pytest.approx(spent)
        assert found["fedmentor_ledger_epsilon_left"][client.domain,] == pytest.approx(8.0 - spent)
        assert found["fedmentor_ledger_verified"][client.domain,] == 1.0
        assert found["fedmentor_ledger_last_charge_timestamp_seconds"][client.domain,] > 1.7e9


def test_labels_hold_names_and_nothing_else(study):
    allowed = {study.run_id, study.store_url, "one", "two", "up", "down", "trained", "rested", "failed", "rejected",
               "bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean"}  # fmt: skip
    assert {
        label for samples in collected(study.store_url).values() for labels in samples for label in labels
    } <= allowed


def test_a_broken_chain_shows_and_hides_no_other(study, tmp_path):
    import shutil
    from urllib.parse import urlparse

    copy = tmp_path / "store"
    shutil.copytree(urlparse(study.store_url).path, copy)
    entry = copy / "ledgers" / "one" / "00000001.json"
    entry.chmod(0o644)
    entry.write_bytes(entry.read_bytes().replace(b'"steps":2', b'"steps":1'))
    found = collected(copy.as_uri())
    assert found["fedmentor_ledger_verified"] == {("one",): 0.0, ("two",): 1.0}
    assert ("one",) not in found["fedmentor_ledger_epsilon_left"]
    assert ("two",) in found["fedmentor_ledger_epsilon_left"]


def test_the_same_store_twice_makes_no_sample_twice(study):
    assert collected(study.store_url, study.store_url) == collected(study.store_url)


def test_a_store_out_of_reach_is_a_metric_and_not_a_crash(study):
    from fedmentor_core.config import StorageConfig

    settings = StorageConfig(endpoint_url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.5)
    registry = CollectorRegistry()
    registry.register(StudyMetrics([open_store("s3://nowhere/x", settings), open_store(study.store_url)]))
    assert registry.get_sample_value("fedmentor_store_up", {"store": "s3://nowhere/x"}) == 0.0
    assert registry.get_sample_value("fedmentor_store_up", {"store": study.store_url}) == 1.0


def test_prometheus_can_read_what_is_served(study):
    port = free_port()
    serve_metrics([open_store(study.store_url)], port)
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    assert answer.status_code == 200
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert set(families) == set(METRICS)
    assert families["fedmentor_ledger_epsilon_left"].samples


def test_a_taken_port_is_said_in_one_line(study):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        with pytest.raises(ConfigError, match="--port"):
            serve_metrics([open_store(study.store_url)], one.getsockname()[1])
