"""How cost grows: with ledger entries, clients, rounds, domains to plan, adapter size and prompts to answer.

Each benchmark measures one operation at sizes a constant factor apart and fits cost = c * size^k by least squares on
logarithms. The cost is processor time, which other work on the machine hardly changes. k near 1 is linear growth;
below 1, a fixed cost still weighs at these sizes; above 1, it will be the bottleneck. The slope between the two largest
sizes is given too, because a fixed cost bends the line at small ones.
"""

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import linear_regression
from typing import Any

from bench_aggregation import LAYERS, fedmentor_files
from harness import Arm, Finding, Plan, Ratio, Sample, Scale, Turn, benchmark, median_of

QUICKSTART = Path(__file__).resolve().parents[2] / "infra" / "configs" / "quickstart.yaml"
NO_ADAPTER = {"key": "adapters/a", "sha256": "0" * 64, "n_bytes": 1}


@benchmark("scale-ledger", title="one charge to an account by its number of entries", minutes=0.6)
def scale_ledger(scale: Scale) -> Plan:
    """A charge and a reading: verified from the first entry, as a new process does, and from where it was verified to.

    Requests are those that a bucket would get: one for each object read or written, one for each 1,000 names listed.
    """
    sizes = (10, 100) if scale.quick else (10, 100, 1_000, 5_000, 11_000)
    kinds = {"verified anew": False, "remembered": True}
    names = {kind: {f"{size:,} entries, {kind}": size for size in sizes} for kind in kinds}

    def conclude(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
        return [
            Finding(f"{kind}, {finding.name}", finding.value)
            for kind in kinds
            for finding in _exponents(names[kind], samples)
        ]

    anew, remembered = (list(names[kind])[-1] for kind in kinds)
    return Plan(
        [
            Arm(name, charge_to_account, {"size": size, "remembers": kinds[kind]})
            for kind in kinds
            for name, size in names[kind].items()
        ],
        [
            Ratio(f"{what} of the largest account, remembered over anew", of=remembered, to=anew, what=what)
            for what in ("cpu_seconds", "requests")
        ],
        turns=1 if scale.quick else 3,
        warm_up=1,
        conclude=conclude,
    )


@benchmark("ledger-far", title="a new process reads a ledger that is 10 ms away", minutes=0.4)
def ledger_far(scale: Scale) -> Plan:
    """Entries read one at a time, and side by side as from an S3 store."""
    size = 100 if scale.quick else 1_000
    arms = {"one at a time": 1, "side by side": 8}
    return Plan(
        [Arm(name, read_from_afar, {"size": size, "at_once": at_once}) for name, at_once in arms.items()],
        [Ratio("side by side over one at a time", of="side by side", to="one at a time")],
        turns=1 if scale.quick else 2,
        notes=[f"{size} entries; each read waits 10 ms besides, and everything is verified."],
    )


@benchmark("scale-manifest", title="committing a round and reading it back by its number of clients", minutes=0.2)
def scale_manifest(scale: Scale) -> Plan:
    """The manifest holds a line per client; it is written as one object."""
    sizes = (10, 100) if scale.quick else (10, 100, 1_000, 10_000)
    return _growth("clients", sizes, commit_manifest, turns=3, scale=scale)


@benchmark("scale-rounds", title="finding where to resume by the number of committed rounds", minutes=0.2)
def scale_rounds(scale: Scale) -> Plan:
    """A resumed study reads every committed round of three clients."""
    sizes = (3, 30) if scale.quick else (3, 30, 300, 1_000)
    return _growth("rounds", sizes, read_rounds, turns=3, scale=scale)


@benchmark("scale-plan", title="planning the budgets by the number of domains", minutes=0.7)
def scale_plan(scale: Scale) -> Plan:
    """Calibration of the noise and the filter's order, for domains that differ in size; without the PRV diagnostic."""
    sizes = (1, 3) if scale.quick else (1, 3, 10, 30)
    return _growth("domains", sizes, plan_domains, turns=3, scale=scale)


@benchmark("scale-adapter", title="joining four updates by the number of blocks that are adapted", minutes=0.3)
def scale_adapter(scale: Scale) -> Plan:
    """Blocks of SmolLM2-1.7B at rank 16, B only: 1.7 MB each in fp32."""
    sizes = (1, 4) if scale.quick else (1, 4, 12, LAYERS)
    return _growth("blocks", sizes, join_four, turns=3, scale=scale)


@benchmark("scale-prompts", title="answering prompts with the embedded backbone by their number", minutes=0.3)
def scale_prompts(scale: Scale) -> Plan:
    """Random prompts of 40 to 120 tokens, 16 new tokens each."""
    sizes = (4, 8) if scale.quick else (8, 32, 128)
    return _growth("prompts", sizes, answer_prompts, turns=3, scale=scale)


def _growth(unit: str, sizes: Sequence[int], prepare: Callable[..., Turn], *, turns: int, scale: Scale) -> Plan:
    names = {f"{size:,} {unit}": size for size in sizes}

    return Plan(
        [Arm(name, prepare, {"size": size}) for name, size in names.items()],
        turns=1 if scale.quick else turns,
        warm_up=1,
        conclude=partial(_exponents, names),
    )


def _exponents(names: Mapping[str, int], samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
    """Of the arms of these names, each with its size."""
    points = [(size, median_of(samples[name], "cpu_seconds")) for name, size in names.items() if name in samples]
    if len(points) < 2:
        return []
    found = [Finding("exponent over all sizes", exponent(points))]
    return [*found, Finding("exponent between the two largest", exponent(points[-2:]))]


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """k of cost = c * size^k that fits best on logarithms."""
    return linear_regression([math.log(size) for size, _ in points], [math.log(cost) for _, cost in points]).slope


# --- what the arms do --------------------------------------------------------------------------------------------


def charge_to_account(size: int, remembers: bool) -> Turn:
    """An account that has ``size`` entries at first; each turn adds one more and reads the account once."""
    from fedmentor_core.privacy.filter import PrivacyAccount
    from fedmentor_core.privacy.ledger import Ledger, Terms
    from fedmentor_core.privacy.verified_prefix import VerifiedPrefix

    folder = tempfile.TemporaryDirectory(prefix="fedmentor-bench-")
    store = _counting_store(Path(folder.name))
    ledger = Ledger(store, "one", VerifiedPrefix() if remembers else None)
    account = PrivacyAccount.open(8.0, 1e-5, 0.05, 100)
    ledger.open_account(account, run_id="bench", dataset_fingerprint="0" * 64, terms=Terms())
    _lengthen(Path(folder.name), account, size)
    attempts = iter(range(10**6))

    def turn() -> Sample:
        assert folder  # lives as long as the arm
        store.requests = 0
        started = time.perf_counter()
        ledger.charge(account, run_id="bench", round_index=0, attempt=next(attempts), dataset_fingerprint="0" * 64,
                      noise_multiplier=1e3, sample_rate=1e-4, steps=1)  # fmt: skip
        entries = len(ledger.entries())
        return Sample(time.perf_counter() - started, figures={"requests": store.requests, "entries": entries})

    return turn


def read_from_afar(size: int, at_once: int) -> Turn:
    """The whole chain, by a reader that remembers nothing."""
    from fedmentor_core.privacy.filter import PrivacyAccount
    from fedmentor_core.privacy.ledger import Ledger, Terms
    from fedmentor_core.storage.local import LocalStore

    class FarStore(LocalStore):
        reads_at_once = at_once

        def _read(self, key: str) -> tuple[bytes, str | None]:
            time.sleep(0.01)
            return super()._read(key)

    folder = tempfile.TemporaryDirectory(prefix="fedmentor-bench-")
    account = PrivacyAccount.open(8.0, 1e-5, 0.05, 100)
    near = Ledger(LocalStore(Path(folder.name)), "one", None)
    near.open_account(account, run_id="bench", dataset_fingerprint="0" * 64, terms=Terms())
    _lengthen(Path(folder.name), account, size)

    def turn() -> Sample:
        started = time.perf_counter()
        entries = len(Ledger(FarStore(Path(folder.name)), "one", None).entries())
        return Sample(time.perf_counter() - started, figures={"entries": entries})

    return turn


def _counting_store(folder: Path) -> Any:
    """A folder that counts the requests a bucket would get."""
    from fedmentor_core.storage.local import LocalStore

    class CountingStore(LocalStore):
        requests = 0

        def _read(self, key: str) -> tuple[bytes, str | None]:
            self.requests += 1
            return super()._read(key)

        def _create(self, key: str, body: Any) -> None:
            self.requests += 1
            super()._create(key, body)

        def list_keys(self, prefix: str) -> Iterator[str]:
            found = list(super().list_keys(prefix))
            self.requests += max(1, math.ceil(len(found) / 1_000))
            yield from found

    return CountingStore(folder)


def _lengthen(folder: Path, account: Any, size: int) -> None:
    """Put further charges into the chain as the ledger itself would, but without reading it anew for each."""
    from fedmentor_core.hashing import canonical_json, sha256_bytes
    from fedmentor_core.records import LedgerEntry

    last = sorted((folder / "ledgers" / "one").iterdir())[-1]
    previous, start = sha256_bytes(last.read_bytes()), int(last.stem) + 1
    cost = account.charge_of(1e3, 1e-4, 1)
    for sequence in range(start, size):
        entry = LedgerEntry(
            sequence=sequence, kind="charge", domain="one", dataset_fingerprint="0" * 64, run_id=f"night-{sequence}",
            round_index=0, noise_multiplier=1e3, sample_rate=1e-4, steps=1, rdp_charge=cost,
            rdp_order=account.rdp_order, rdp_budget=account.rdp_budget, epsilon_budget=account.epsilon,
            delta=account.delta, created_at="2026-01-01T00:00:00.000+00:00", previous=previous,
        )  # fmt: skip
        data = canonical_json(entry.model_dump(mode="json"))
        (folder / "ledgers" / "one" / f"{sequence:08d}.json").write_bytes(data)
        previous = sha256_bytes(data)
        (folder / "ledger-witnesses" / "one" / f"{sequence:08d}").write_text(previous)


def commit_manifest(size: int) -> Turn:
    """A round's manifest of ``size`` clients: to JSON, to the store, and read back as records."""
    from fedmentor_core.records import RoundManifest
    from fedmentor_core.storage.base import open_store

    folder = tempfile.TemporaryDirectory(prefix="fedmentor-bench-")
    store, manifest = open_store(Path(folder.name).as_uri()), _manifest(size)
    rounds = iter(range(10**6))

    def turn() -> Sample:
        assert folder  # lives as long as the arm
        key = f"rounds/{next(rounds):04d}/manifest.json"
        started = time.perf_counter()
        ref = store.put_json(key, manifest)
        RoundManifest.model_validate(store.get_json(key))
        return Sample(time.perf_counter() - started, bytes=ref.n_bytes)

    return turn


def read_rounds(size: int) -> Turn:
    """``size`` committed rounds of three clients, read as a resumed study reads them."""
    from fedmentor_core.records import RoundManifest
    from fedmentor_core.storage.base import open_store

    folder = tempfile.TemporaryDirectory(prefix="fedmentor-bench-")
    store, manifest = open_store(Path(folder.name).as_uri()), _manifest(3)
    for index in range(size):
        store.put_json(f"rounds/{index:04d}/manifest.json", manifest)

    def turn() -> None:
        assert folder  # lives as long as the arm
        for index in range(size):
            assert store.exists(f"rounds/{index:04d}/manifest.json")
            RoundManifest.model_validate(store.get_json(f"rounds/{index:04d}/manifest.json"))

    return turn


def _manifest(n_clients: int) -> Any:
    from fedmentor_core.records import (
        ArtifactRef,
        ClientSummary,
        EvaluationMetrics,
        GateSummary,
        Metrics,
        RoundManifest,
        RoundSummary,
    )

    names = [f"client-{index:06d}" for index in range(n_clients)]
    scores = {"bertscore_f1": 0.7, "rouge_l": 0.3, "label_f1": 0.4, "safe_rate": 1.0, "toxicity_mean": 0.01,
              "toxicity_max": 0.02, "empty_rate": 0.0, "n_examples": 16}  # fmt: skip
    clients = tuple(
        ClientSummary(
            domain=name, status="trained", ledger_entry="0" * 64, n_units=4000, sample_rate=0.024, steps=3,
            noise_multiplier=0.709, clip_norm=0.1, epsilon_spent=4.0, epsilon_budget=8.0, delta=1e-5,
            bytes_up=41_000_000, bytes_down=41_000_000, seconds=12.3,
        )
        for name in names
    )  # fmt: skip
    summary = RoundSummary(
        round_index=0,
        clients=clients,
        metrics=EvaluationMetrics(**scores, by_domain={name: Metrics(**scores) for name in names}),
        gate=GateSummary(passed=True, reasons=()),
        noise_changes=(),
        bytes_total=82_000_000 * n_clients,
        seconds=30.0,
    )
    return RoundManifest(
        run_id="bench", round_index=0, config_sha256="0" * 64, adapter=ArtifactRef(**NO_ADAPTER), summary=summary,
        next_noise=dict.fromkeys(names, 0.7), rounds_below=dict.fromkeys(names, 0),
    )  # fmt: skip


def plan_domains(size: int) -> Turn:
    """Plans of ``size`` domains of different sizes; nothing is remembered from turn to turn."""
    from fedmentor_core.config_io import load_config
    from fedmentor_core.privacy.accountant import rdp_per_step
    from fedmentor_core.privacy.plan import plan_domain

    config = load_config(QUICKSTART)

    def turn() -> None:
        rdp_per_step.cache_clear()
        for index in range(size):
            plan_domain(config, config.domains[index % 3], n_units=2000 + 37 * index, dataset_fingerprint="0" * 64,
                        bytes_up=1, bytes_down=1, with_prv=False)  # fmt: skip

    return turn


def join_four(size: int) -> Turn:
    """Four updates of an adapter on ``size`` blocks, out of a store."""
    return fedmentor_files(count=4, layers=size)


def answer_prompts(size: int) -> Turn:
    """``size`` prompts through the production generation."""
    from fedmentor_core.adapters.backbone import load_backbone
    from fedmentor_core.config_io import load_config
    from fedmentor_core.evaluation.generate import generate
    from flows.quiet import silence_libraries

    silence_libraries()
    backbone = load_backbone(load_config(QUICKSTART).backbone)
    chance = random.Random(1)
    n_tokens = len(backbone.tokenizer)
    prompts = [[chance.randrange(10, n_tokens) for _ in range(chance.randint(40, 120))] for _ in range(size)]

    def turn() -> None:
        generate(backbone.model, backbone.tokenizer, prompts, max_new_tokens=16, device=backbone.device)

    return turn
