"""A real MLflow database, migrated once a session and copied; and the records of an invented study."""

import shutil
from pathlib import Path

import pytest

from fedmentor_core.config import StudyConfig
from fedmentor_core.lineage import LedgerPlace, Lineage, head_of
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.records import (
    AdapterSummary,
    ArtifactRef,
    BackboneSummary,
    ClientSummary,
    DomainPlan,
    EvaluationMetrics,
    GateSummary,
    Metrics,
    NoiseChange,
    RoundSummary,
    ScorerIdentities,
    StudyPlan,
    StudySummary,
)
from fedmentor_core.storage.local import LocalStore
from tasks.tracking import Tracker, mlflow_client, open_tracking

DOMAINS = ("stress", "sleep")


class Study:
    """Makes the records of one invented study."""

    config = StudyConfig.model_validate(
        {
            "name": "tiny-study",
            "rounds": 2,
            "domains": [
                {"name": name, "source": {"kind": "dreaddit", "form": "raw"}, "epsilon": 8.0} for name in DOMAINS
            ],
            "evaluation": {"gate_data": "public"},
            "tracking": {"experiment": "tests"},
            "storage": {"endpoint_url": "http://localhost:9000"},
        }
    )

    def metrics(self, value: float = 0.5) -> EvaluationMetrics:
        one = Metrics(
            bertscore_f1=value,
            rouge_l=value / 2,
            label_f1=value,
            safe_rate=1.0,
            toxicity_mean=0.01,
            toxicity_max=0.05,
            empty_rate=0.0,
            n_examples=8,
        )
        return EvaluationMetrics(**one.model_dump(), by_domain=dict.fromkeys(DOMAINS, one))

    def client(self, domain: str, round_index: int) -> ClientSummary:
        return ClientSummary(
            domain=domain,
            status="trained",
            n_units=128,
            sample_rate=0.25,
            steps=4,
            noise_multiplier=1.0 - 0.05 * round_index,
            clip_norm=1.0,
            epsilon_spent=1.0 + round_index,
            epsilon_budget=8.0,
            delta=1e-5,
            bytes_up=1000,
            bytes_down=2000,
            seconds=0.5,
        )

    def round(self, round_index: int) -> RoundSummary:
        return RoundSummary(
            round_index=round_index,
            clients=tuple(self.client(domain, round_index) for domain in DOMAINS),
            metrics=self.metrics(0.5 + 0.1 * round_index),
            gate=GateSummary(passed=round_index > 0, reasons=() if round_index else ("label_f1 too low",)),
            noise_changes=(NoiseChange(domain="sleep", from_=1.0, to=0.95, reason="below 0.5"),),
            bytes_total=6000,
            seconds=1.5,
        )

    def plan(self) -> StudyPlan:
        return StudyPlan(
            domains=tuple(
                DomainPlan(
                    domain=domain,
                    n_units=128,
                    sample_rate=0.25,
                    steps_per_round=4,
                    rounds=2,
                    noise_multiplier=1.0,
                    min_noise_multiplier=0.3,
                    clip_norm=1.0,
                    delta=1e-5,
                    sensitivity=None,
                    epsilon_budget=8.0,
                    epsilon_planned_rdp=4.0,
                    epsilon_planned_prv=3.9,
                    rdp_order=8.0,
                    rdp_budget=3.0,
                    reserve_fraction=0.1,
                    dataset_fingerprint=f"{domain:0<64}",
                    bytes_up_per_round=1000,
                    bytes_down_per_round=2000,
                )
                for domain in DOMAINS
            ),
            bytes_per_round=6000,
            refusals=(),
        )

    def summary(self, run_id: str = "run-1") -> StudySummary:
        return StudySummary(
            run_id=run_id,
            study=self.config.name,
            status="promoted",
            private=True,
            config_sha256="c" * 64,
            backbone=BackboneSummary(name="embedded", n_parameters=10, sha256="b" * 64),
            adapter=AdapterSummary(rank=8, alpha=16, target_modules=("q_proj",), train="b", n_trainable=5, n_bytes=20),
            scorers=ScorerIdentities(bertscore="x", rouge="y", toxicity="z", safe_threshold=0.5),
            baseline=self.metrics(0.2),
            baseline_gate=self.metrics(0.25),
            rounds=(self.round(0), self.round(1)),
            selected_round=1,
            final=self.metrics(0.55),
            plan=self.plan(),
            model=None,
            seconds_total=12.5,
        )


@pytest.fixture(scope="session")
def study() -> Study:
    return Study()


@pytest.fixture
def ledgers(tmp_path: Path) -> LocalStore:
    """Real accounts of the study's domains, each charged once."""
    store = LocalStore(tmp_path / "ledgers")
    for domain in DOMAINS:
        account = PrivacyAccount.open(8.0, 1e-5, 0.25, 8)
        ledger = Ledger(store, domain)
        ledger.open_account(account, run_id="run-0", dataset_fingerprint="f" * 64)
        ledger.charge(
            account,
            run_id="run-0",
            round_index=0,
            attempt=0,
            dataset_fingerprint="f" * 64,
            noise_multiplier=2.0,
            sample_rate=0.25,
            steps=4,
        )
    return store


@pytest.fixture
def lineage(study: Study, ledgers: LocalStore) -> Lineage:
    """Of an adapter that those accounts paid for."""
    return Lineage(
        git_revision="unknown",
        adapter=ArtifactRef(key="runs/run-0/adapters/a.safetensors", sha256="a" * 64, n_bytes=20),
        manifests=("1" * 64, "2" * 64),
        gate_manifest="2" * 64,
        scorers=study.summary().scorers,
        ledger=LedgerPlace(url=ledgers.url),
        heads=tuple(head_of(Ledger(ledgers, domain)) for domain in DOMAINS),
    )


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "template.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(tmp_path: Path, template_database: Path) -> str:
    path = tmp_path / "mlflow" / "mlflow.db"
    path.parent.mkdir()
    shutil.copyfile(template_database, path)
    return f"sqlite:///{path}"


@pytest.fixture
def tracker(tracking_uri: str, study: Study) -> Tracker:
    return open_tracking(study.config, tracking_uri)
