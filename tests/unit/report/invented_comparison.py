"""Invented comparisons, for the tests of the comparison's report: cells by a formula, and the table over them."""

import math
import random
from statistics import median

from invented_summary import make_metrics

from fedmentor_core.compare.records import (
    ArmResult,
    CellResult,
    ComparisonTable,
    Difference,
    FailedCell,
    FrontierPoint,
    Identity,
)
from fedmentor_core.compare.statistics import estimate, paired
from fedmentor_core.records import (
    ClientSummary,
    EvaluationMetrics,
    GateSummary,
    Metrics,
    RoundSummary,
    Sample,
    ScorerIdentities,
)

DOMAINS = ("stress", "interpersonal", "wellbeing")
ARMS = {
    "base": ("untrained backbone", False, 0.0),
    "local": ("each domain alone, without privacy", False, 1.2),
    "centralized": ("all data on one machine, without privacy", False, 2.0),
    "federated": ("federated, without privacy", False, 1.8),
    "uniform": ("federated, one budget for all domains", True, 1.1),
    "fedmentor-fixed": ("a budget per domain, fixed noise", True, 1.5),
    "fedmentor": ("a budget per domain, noise adapted by the gate", True, 1.7),
}
KEYS = ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean", "toxicity_max", "empty_rate")
IDENTITY = Identity(
    backbone_sha256="ab" * 32,
    scorers=ScorerIdentities(
        bertscore="all-MiniLM-L6-v2 layer 5, bert-score 0.3.13",
        rouge="rougeL F-measure, stemmed, rouge-score 0.1.2",
        toxicity="fedmentor-toxicity-small, sha256 ab12",
        safe_threshold=0.5,
    ),
    splits={domain: f"{place}c" * 32 for place, domain in enumerate(DOMAINS)},
    evaluation_sha256="ef" * 32,
)


def evaluation(step, shift, domains=DOMAINS):
    by_domain = {name: Metrics(**make_metrics(step, shift=shift + 0.03 * (k - 1))) for k, name in enumerate(domains)}
    return EvaluationMetrics(**make_metrics(step, shift=shift, n=24 * len(domains)), by_domain=by_domain)


def cell(arm, seed, *, epsilon=None, rounds=4, text="", jitter=0.004, warnings=(), arms=ARMS):
    title, private, strength = arms[arm]
    dice = random.Random(f"{arm} {seed} {epsilon}")
    if private and epsilon is not None:
        strength *= 1 - math.exp(-epsilon / 2)

    def scores(step):
        return evaluation(strength * step, dice.gauss(0, jitter))

    def client(domain, k, index):
        noise = 0.7 + 0.1 * k - 0.02 * index * (arm == "fedmentor") if private else None
        return ClientSummary(
            domain=domain, status="trained", n_units=2210, sample_rate=0.05, steps=16, noise_multiplier=noise,
            clip_norm=0.1, epsilon_spent=1.9 * (index + 1) if private else None,
            epsilon_budget=8.0 if private else None, delta=1e-5 if private else None,
            bytes_up=330_000, bytes_down=330_000, seconds=40.0 + k,
        )  # fmt: skip

    made = tuple(
        RoundSummary(
            round_index=index,
            clients=tuple(client(domain, k, index) for k, domain in enumerate(DOMAINS)),
            metrics=scores((index + 1) / rounds),
            gate=GateSummary(passed=True, reasons=()),
            noise_changes=(),
            bytes_total=1_980_000,
            seconds=130.0,
        )
        for index in range(rounds if strength else 0)
    )
    samples = tuple(
        Sample(
            domain=domain,
            post=f"An invented post of {domain}, number {number}: I could not sleep before the exam and snapped at all.",
            question="Does the writer feel stressed?",
            reference="Yes, the writer is stressed. Reasoning: no sleep before an exam.",
            output=text or f"Yes. Reasoning: {title} says that {domain} post {number} speaks of an exam and no sleep.",
            bertscore_f1=0.71,
            rouge_l=0.31,
            toxicity=0.002,
        )
        for domain in DOMAINS[:2]
        for number in (1, 2)
    )
    return CellResult(
        key=f"{arm}-{seed}-{epsilon}",
        arm=arm,
        seed=seed,
        epsilon=epsilon,
        identity=IDENTITY,
        final=scores(1.0),
        rounds=made,
        samples=() if epsilon is not None else samples,
        epsilon_spent=dict.fromkeys(DOMAINS, 7.6) if private else {},
        bytes_total=1_980_000 * len(made),
        seconds=60.0 + 130.0 * len(made),
        warnings=tuple(warnings),
    )


def comparison(seeds=(0, 1, 2), budgets=(0.5, 1.0, 2.0, 4.0, 8.0), arms=ARMS, failures=(), **overrides):
    """(table, cells) of every arm over every seed but those in ``failures``, given as (arm, seed)."""
    cells = [cell(arm, seed, arms=arms) for arm in arms for seed in seeds if (arm, seed) not in failures]
    grid = [("uniform", epsilon) for epsilon in budgets]
    cells += [cell(arm, seed, epsilon=epsilon, arms=arms) for arm, epsilon in grid for seed in seeds]

    def of(arm, epsilon=None):
        return [one for one in cells if (one.arm, one.epsilon) == (arm, epsilon)]

    def means(some, scores=lambda one: one.final):
        return {key: estimate([getattr(scores(one), key) for one in some]) for key in KEYS}

    rows = [
        ArmResult(
            name=arm,
            title=title,
            private=private,
            seeds=tuple(one.seed for one in of(arm)),
            metrics=means(of(arm)),
            by_domain={d: means(of(arm), lambda one, d=d: one.final.by_domain[d]) for d in DOMAINS},
            epsilon_spent=of(arm)[0].epsilon_spent,
            bytes_per_round=1_980_000 if of(arm)[0].rounds else 0,
            seconds=median(one.seconds for one in of(arm)),
        )
        for arm, (title, private, _) in arms.items()
        if of(arm)
    ]
    frontier = [FrontierPoint(arm=arm, epsilon=eps, metrics=means(of(arm, eps))) for arm, eps in grid]
    if budgets:
        frontier.append(FrontierPoint(arm="federated", epsilon=None, metrics=means(of("federated"))))
    pairs = [(row.name, "federated") for row in rows if row.name != "federated"]
    values = {
        "name": "three-corpora",
        "against": "federated",
        "arms": tuple(rows),
        "differences": tuple(
            one for arm, against in pairs for key in KEYS if (one := difference(of(arm), of(against), key))
        ),
        "frontier": tuple(frontier),
        "identity": IDENTITY if cells else None,
        "failures": tuple(
            FailedCell(arm=arm, seed=seed, reason="out of memory: got 2.1 GB, allowed 2 GB; lower batch_size")
            for arm, seed in failures
        ),
        "machine": {"cpu": "two cores", "python": "3.11.9"},
        "command": "fedmentor compare --config compare.yaml --set store=s3://key:hunter2@host/bucket --out runs/compare",
        "seconds_total": sum(one.seconds for one in cells),
    }
    return ComparisonTable(**{**values, **overrides}), cells


def difference(mine, other, key):
    """One pair of arms on one metric, over the seeds that both have; None without any."""
    found = paired(*({one.seed: getattr(one.final, key) for one in some} for some in (mine, other)))
    if found is None:
        return None
    return Difference(
        arm=mine[0].arm, against=other[0].arm, metric=key, mean=found.mean, ci95=found.ci95,
        p_value=found.p_value, n=found.n,
    )  # fmt: skip
