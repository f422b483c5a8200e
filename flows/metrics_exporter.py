"""``fedmentor metrics``: Prometheus metrics of studies, read from their stores; only numbers that are public already.

What is exported stands in ledgers and round manifests, which hold nothing that was not charged for. Object names and
error texts never become labels.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fedmentor_core.errors import ConfigError, FedMentorError, LedgerError
from fedmentor_core.privacy.ledger import Ledger, ledger_domains
from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.records import RoundManifest
from fedmentor_core.storage.base import ArtifactStore

METRICS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "fedmentor_store_up": ("1: the store could be read at the last scrape.", ("store",)),
    "fedmentor_ledger_verified": ("1: the account's chain is whole; 0: broken, training fails closed.", ("domain",)),
    "fedmentor_ledger_private": ("0: at least one charge paid for seeded noise.", ("domain",)),
    "fedmentor_ledger_epsilon_budget": ("Lifetime promise of the account.", ("domain",)),
    "fedmentor_ledger_epsilon_spent": ("Lifetime epsilon spent, over all runs.", ("domain",)),
    "fedmentor_ledger_epsilon_left": ("Budget less spent.", ("domain",)),
    "fedmentor_ledger_delta": ("Delta of the account.", ("domain",)),
    "fedmentor_ledger_runs_left": ("Runs like the last one that the rest of the budget carries.", ("domain",)),
    "fedmentor_ledger_last_charge_timestamp_seconds": ("Unix time of the newest charge.", ("domain",)),
    "fedmentor_rounds_committed": ("Rounds whose manifest is in the store.", ("run",)),
    "fedmentor_round_index": ("Newest committed round, from 0.", ("run",)),
    "fedmentor_round_seconds": ("Wall time of the newest round.", ("run",)),
    "fedmentor_round_bytes": ("Bytes that all clients moved in the newest round, both ways.", ("run",)),
    "fedmentor_round_clients": ("Clients of the newest round by what became of them.", ("run", "status")),
    "fedmentor_gate_passed": ("1: the newest round passed its gate.", ("run",)),
    "fedmentor_gate_thresholds_failed": ("Thresholds that the newest round missed.", ("run",)),
    "fedmentor_gate_metric": ("Gate metric of the newest round: of a public set, or noised.", ("run", "metric")),
    "fedmentor_client_noise_multiplier": ("Noise multiplier of the newest round.", ("run", "domain")),
    "fedmentor_client_epsilon_spent": ("Lifetime epsilon spent, as the site reported it.", ("run", "domain")),
    "fedmentor_client_epsilon_left": ("Budget less spent, as the site reported it.", ("run", "domain")),
    "fedmentor_client_bytes": ("Bytes of the newest round.", ("run", "domain", "direction")),
    "fedmentor_client_seconds": ("The client's time in the newest round.", ("run", "domain")),
}
"""Every metric: its help and its labels. Dashboards and alert rules may use these names and no others."""

_MANIFEST = re.compile(r"runs/[^/]+/rounds/\d+/manifest\.json")
_GATE_METRICS = ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean")
_CLIENT_STATUS = ("trained", "rested", "failed", "rejected")

Sample = tuple[str, tuple[str, ...], float]
"""A metric's name, its label values and its value."""


class StudyMetrics(Collector):
    """Reads the stores again at each scrape. Manifests never change, so each is read once."""

    def __init__(self, stores: Sequence[ArtifactStore]) -> None:
        """Nothing is read yet."""
        self._stores = stores
        self._manifests: dict[tuple[str, str], RoundManifest] = {}
        self._lock = threading.Lock()  # two scrapes at once would read every new manifest twice

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Name the metrics without reading a store, as registration asks."""
        return [_family(name) for name in METRICS]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """All metrics of all stores. A store that cannot be read shows as ``fedmentor_store_up`` 0."""
        families = {name: _family(name) for name in METRICS}
        seen: set[tuple[str, tuple[str, ...]]] = set()
        with self._lock:
            for store in self._stores:
                for name, labels, value in self._samples(store):
                    if (name, labels) not in seen:  # one account twice would make Prometheus refuse the whole page
                        seen.add((name, labels))
                        families[name].add_metric(labels, value)
        return families.values()

    def _samples(self, store: ArtifactStore) -> Iterator[Sample]:
        try:
            found = [*_ledger_samples(store), *self._round_samples(store)]
        except FedMentorError:
            found = []
            reached = 0.0
        else:
            reached = 1.0
        yield "fedmentor_store_up", (store.url,), reached
        yield from found

    def _round_samples(self, store: ArtifactStore) -> Iterator[Sample]:
        by_run: dict[str, list[str]] = {}
        for key in store.list_keys("runs"):
            if _MANIFEST.fullmatch(key):
                by_run.setdefault(key.split("/")[1], []).append(key)
        for run, keys in by_run.items():
            yield "fedmentor_rounds_committed", (run,), len(keys)
            yield from _newest_round(run, self._manifest(store, max(keys)))

    def _manifest(self, store: ArtifactStore, key: str) -> RoundManifest:
        place = (store.url, key)
        if place not in self._manifests:
            self._manifests[place] = RoundManifest.model_validate(store.get_json(key))
        return self._manifests[place]


def serve_metrics(stores: Sequence[ArtifactStore], port: int, host: str = "127.0.0.1") -> threading.Thread:
    """Serve ``/metrics`` from a thread of its own and return that thread.

    Args:
        stores: what to read; the credentials need no more than ``infra/policies/store_monitor.json``.
        port: to listen on; 0 chooses one.
        host: address to listen on.

    Raises:
        ConfigError: it cannot listen there.
    """
    registry = CollectorRegistry()
    registry.register(StudyMetrics(stores))
    try:
        _, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}). Choose another --port or --host."
        ) from None
    return thread


def _family(name: str) -> GaugeMetricFamily:
    text, labels = METRICS[name]
    return GaugeMetricFamily(name, text, labels=labels)


def _ledger_samples(store: ArtifactStore) -> Iterator[Sample]:
    for domain in ledger_domains(store):
        try:
            view = Ledger(store, domain).view()
        except LedgerError:
            yield "fedmentor_ledger_verified", (domain,), 0.0
        else:
            yield from _account(view)


def _account(view: LedgerView) -> Iterator[Sample]:
    label = (view.domain,)
    yield "fedmentor_ledger_verified", label, 1.0
    yield "fedmentor_ledger_private", label, float(view.private)
    facts = {
        "fedmentor_ledger_epsilon_budget": view.epsilon_budget,
        "fedmentor_ledger_epsilon_spent": view.epsilon_spent,
        "fedmentor_ledger_epsilon_left": view.epsilon_left,
        "fedmentor_ledger_delta": view.delta,
        "fedmentor_ledger_runs_left": None if view.tonight is None else view.tonight.such_runs_left,
    }
    for name, value in facts.items():
        if value is not None:
            yield name, label, float(value)
    charged = [entry["created_at"] for entry in view.entries if entry["kind"] in ("charge", "evaluation")]
    if charged:
        newest = datetime.fromisoformat(charged[-1]).timestamp()
        yield "fedmentor_ledger_last_charge_timestamp_seconds", label, newest


def _newest_round(run: str, manifest: RoundManifest) -> Iterator[Sample]:
    made = manifest.summary
    yield "fedmentor_round_index", (run,), made.round_index
    yield "fedmentor_round_seconds", (run,), made.seconds
    yield "fedmentor_round_bytes", (run,), made.bytes_total
    for status in _CLIENT_STATUS:
        yield "fedmentor_round_clients", (run, status), sum(one.status == status for one in made.clients)
    yield "fedmentor_gate_passed", (run,), float(made.gate.passed)
    yield "fedmentor_gate_thresholds_failed", (run,), sum(not one.passed for one in made.gate.results)
    for metric in _GATE_METRICS:
        yield "fedmentor_gate_metric", (run, metric), float(getattr(made.metrics, metric))
    for client in made.clients:
        label = (run, client.domain)
        yield "fedmentor_client_bytes", (*label, "up"), client.bytes_up
        yield "fedmentor_client_bytes", (*label, "down"), client.bytes_down
        yield "fedmentor_client_seconds", label, client.seconds
        if client.noise_multiplier is not None:
            yield "fedmentor_client_noise_multiplier", label, client.noise_multiplier
        if client.epsilon_spent is not None and client.epsilon_budget is not None:
            yield "fedmentor_client_epsilon_spent", label, client.epsilon_spent
            yield "fedmentor_client_epsilon_left", label, max(0.0, client.epsilon_budget - client.epsilon_spent)
