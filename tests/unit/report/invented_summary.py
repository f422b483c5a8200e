"""Invented records and a checker of pages, for the tests of the report."""

import math
import re
from html.parser import HTMLParser

from fedmentor_core.config import StudyConfig
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.records import (
    AdapterSummary,
    BackboneSummary,
    ClientSummary,
    DomainPlan,
    EvaluationMetrics,
    GateSummary,
    Metrics,
    ModelSummary,
    NoiseChange,
    NoiseDecision,
    ReductionCost,
    RoundSummary,
    Sample,
    ScorerIdentities,
    SharedPosts,
    StudyPlan,
    StudySummary,
    ThresholdResult,
    ValidationPlan,
)

BUDGETS = {"stress": 4.0, "interpersonal": 6.0, "wellbeing": 8.0}


def make_config(domains=tuple(BUDGETS), rounds=3, **privacy):
    return StudyConfig.model_validate(
        {
            "name": "invented-study",
            "rounds": rounds,
            "domains": [
                {"name": name, "source": {"kind": "invented", "corpus": name, "n_units": 300}, "epsilon": 4.0}
                for name in domains
            ],
            "privacy": privacy,
            "evaluation": {"gate_data": "public"},
            "tracking": {"uri": "postgresql://mlflow:hunter2@tracker:5432/db"},
        }
    )


def make_metrics(step, shift=0.0, n=24, released=True):
    gain = 1 - math.exp(-0.9 * step)
    return {
        "bertscore_f1": 0.52 + shift + 0.14 * gain,
        "rouge_l": 0.11 + shift + 0.22 * gain,
        "label_f1": 0.34 + 2 * shift + 0.36 * gain,
        "safe_rate": 0.93 + shift / 2 + 0.05 * gain,
        "toxicity_mean": 0.061 - shift / 3 - 0.05 * gain,
        "toxicity_max": 0.71 - 3 * shift - 0.5 * gain if released else None,
        "empty_rate": 0.0,
        "n_examples": n,
    }


def make_evaluation(step, domains, n=24, released=True):
    own = {name: Metrics(**make_metrics(step, 0.02 * (i % 3 - 1), n, released)) for i, name in enumerate(domains)}
    return EvaluationMetrics(**make_metrics(step, 0.0, n * len(domains), released), by_domain=own)


def make_gate(passed):
    results = (
        ThresholdResult(
            metric="bertscore_f1",
            scope="overall",
            value=0.641,
            comparison=">=",
            bound=0.6 if passed else 0.66,
            relative_to="baseline",
            passed=passed,
        ),
        ThresholdResult(
            metric="safe_rate",
            scope="overall",
            value=0.981,
            comparison=">=",
            bound=0.95,
            relative_to="none",
            passed=True,
        ),
        ThresholdResult(
            metric="label_f1",
            scope="stress",
            value=None,
            comparison=">=",
            bound=0.42,
            relative_to="reference",
            passed=passed,
        ),
        ThresholdResult(
            metric="toxicity_mean",
            scope="overall",
            value=0.0153,
            comparison="<=",
            bound=0.05,
            relative_to="none",
            passed=True,
        ),
    )
    return GateSummary(passed=passed, reasons=tuple(str(r) for r in results if not r.passed), results=results)


def make_client(domain, k, i, private, share):
    budget = 4.0 + 2.0 * (i % 3)
    return ClientSummary(
        domain=domain,
        status="trained",
        n_units=1400 + 300 * i,
        sample_rate=0.0457,
        steps=12,
        noise_multiplier=(0.92 - 0.1 * (i % 3)) * (0.95 if k > 2 and i == 0 else 1.0) if private else None,
        clip_norm=1.0,
        epsilon_spent=budget * share if private else None,
        epsilon_budget=budget if private else None,
        delta=1e-5 if private else None,
        bytes_up=412_000,
        bytes_down=412_000,
        seconds=21.3 + 6 * i + k,
    )


def make_summary(
    domains=tuple(BUDGETS),
    rounds=3,
    status="promoted",
    private=True,
    final=True,
    passed=True,
    clients=None,
    first=1,
    **overrides,
):
    made = []
    for k in range(1, rounds + 1):
        lines = [make_client(name, k, i, private, 0.93 * math.sqrt(k / rounds)) for i, name in enumerate(domains)]
        if clients is not None:
            lines = clients(k, lines)
        changes = ()
        if private and k == 2 and rounds > 2:
            changes = (
                NoiseChange(
                    domain=domains[0],
                    from_=0.92,
                    to=0.874,
                    reason="bertscore_f1 0.48 was below 0.50 for 1 round",
                ),
            )
        made.append(
            RoundSummary(
                round_index=k - 1 + first,
                clients=tuple(lines),
                metrics=make_evaluation(k, domains),
                gate=make_gate(passed and k == rounds),
                noise_changes=changes,
                bytes_total=824_000 * len(domains),
                seconds=101.2,
            )
        )
    plans = tuple(
        DomainPlan(
            domain=name,
            n_units=1400 + 300 * i,
            sample_rate=0.0457,
            steps_per_round=12,
            rounds=rounds,
            noise_multiplier=0.92 - 0.1 * (i % 3) if private else None,
            min_noise_multiplier=0.3,
            clip_norm=1.0,
            delta=1e-5 if private else None,
            sensitivity=("high", "medium", "low")[i % 3],
            epsilon_budget=4.0 + 2.0 * (i % 3) if private else None,
            epsilon_spent_before=0.4 if private and i == 1 else None,
            epsilon_planned_rdp=3.6 if private else None,
            epsilon_planned_prv=3.2 if private else None,
            rdp_order=8.0 if private else None,
            rdp_budget=2.1 if private else None,
            reserve_fraction=0.1,
            dataset_fingerprint="f" * 64,
            bytes_up_per_round=412_000,
            bytes_down_per_round=412_000,
        )
        for i, name in enumerate(domains)
    )
    values = {
        "run_id": "run-7f3a",
        "study": "invented-study",
        "status": status,
        "private": private,
        "config_sha256": "c" * 64,
        "backbone": BackboneSummary(name="embedded", n_parameters=4_700_000, sha256="b" * 64),
        "adapter": AdapterSummary(
            rank=8,
            alpha=16.0,
            target_modules=("q_proj", "v_proj"),
            train="b",
            n_trainable=102_400,
            n_bytes=411_000,
        ),
        "scorers": ScorerIdentities(
            bertscore="all-MiniLM-L6-v2, layer 5",
            rouge="rouge-score 0.1.2, stemmed",
            toxicity="fedmentor-toxicity-small, sha256 ab12",
            safe_threshold=0.5,
        ),
        "baseline": make_evaluation(0, domains, n=48),
        "baseline_gate": make_evaluation(0, domains),
        "rounds": tuple(made),
        "selected_round": rounds - 1 + first if final and rounds else None,
        "final": make_evaluation(rounds, domains, n=48) if final else None,
        "plan": StudyPlan(domains=plans, bytes_per_round=824_000 * len(domains), refusals=()),
        "model": ModelSummary(name="fedmentor-adapter", version="3", aliases=("challenger", "champion"))
        if status == "promoted"
        else None,
        "store_url": "s3://someone:secret@bucket/prefix",
        "seconds_total": 372.4,
    }
    return StudySummary(**{**values, **overrides})


def make_samples(domains=tuple(BUDGETS), post="I can't sleep before exams & my hands shake."):
    return [
        Sample(
            domain=name,
            post=post,
            question="Does the poster suffer from stress?",
            reference="Yes. Reasoning: the poster names sleeplessness.",
            output="Yes. Reasoning: the poster cannot sleep.",
            bertscore_f1=0.83,
            rouge_l=0.44,
            toxicity=0.002,
        )
        for name in domains
        for _ in range(2)
    ]


VOID = {"meta", "br", "link", "img", "hr", "input"}


class Checker(HTMLParser):
    """Tags balance; every address and text is kept."""

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data)


def check(html):
    parser = Checker()
    parser.feed(html)
    parser.close()
    assert parser.stack == []
    ids = [value for _, name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in parser.attributes:
        assert not name.startswith("on"), f"{tag} has a handler"
        if name == "href":
            assert value.startswith("#")
            assert value[1:] in ids
        assert name not in ("src", "srcset", "action", "data", "xlink:href", "style")
    assert not {"script", "iframe", "object", "embed", "link", "img", "form", "base"} & set(parser.tags)
    assert not re.search(r"url\(|@import", html)
    assert not re.search(r'(d|x|y|width|height)="[^"]*(nan|inf)', html)
    return parser, re.sub(r"\s+", " ", " ".join(parser.text))


ROUNDS, STEPS, UNITS = 4, 12, 2343


def make_account(domain="stress", runs=1):
    return PrivacyAccount.open(BUDGETS[domain], 1e-5, 64 / UNITS, ROUNDS * STEPS * runs)


def make_private_plan(domain="stress", planned_runs=1, **overrides):
    """A plan as the planner makes it: noise calibrated to 90 % of the run's share, each reduction by 5 %."""
    account = make_account(domain, planned_runs)
    runs_before = planned_runs // 4
    spent = account.rdp_budget * runs_before / planned_runs
    share = (account.rdp_budget - spent) / (planned_runs - runs_before)
    noise = account.least_noise(account.rdp_budget - 0.9 * share, 64 / UNITS, ROUNDS * STEPS)

    def epsilon_with(schedule):
        return account.epsilon_spent(spent + sum(account.charge_of(one, 64 / UNITS, STEPS) for one in schedule))

    planned = epsilon_with([noise] * ROUNDS)
    lowered = [noise * 0.99**k for k in range(ROUNDS)]
    reductions = []
    for k in range(1, ROUNDS):
        at_end = epsilon_with(lowered[:k] + [lowered[k]] * (ROUNDS - k))
        reductions.append(
            ReductionCost(
                after_round=k - 1,
                noise_multiplier=lowered[k],
                epsilon_at_end=at_end,
                epsilon_extra=at_end - planned,
                limited_by="rule",
            )
        )
    validation = tuple(
        ValidationPlan(
            account=f"{domain}.{split}",
            split=split,
            n_units=n_units,
            releases=releases,
            noise_multiplier=10.0,
            metric_std=10.0 / n_units,
            epsilon_budget=2.0,
            delta=1e-5,
            epsilon_spent_before=0.25,
            epsilon_planned=1.31,
            rdp_order=12.0,
            rdp_budget=0.9,
            run_rdp_budget=0.9,
            dataset_fingerprint="e" * 64,
        )
        for split, n_units, releases in (("gate", 250, ROUNDS + 1), ("test", 400, 2))
    )
    values = {
        "domain": domain,
        "n_units": UNITS,
        "sample_rate": 64 / UNITS,
        "steps_per_round": STEPS,
        "rounds": ROUNDS,
        "noise_multiplier": noise,
        "min_noise_multiplier": 0.4,
        "clip_norm": 1.0,
        "delta": 1e-5,
        "sensitivity": "high",
        "epsilon_budget": account.epsilon,
        "epsilon_spent_before": account.epsilon_spent(spent),
        "epsilon_planned_rdp": planned,
        "epsilon_planned_prv": 0.9 * planned,
        "rdp_order": account.rdp_order,
        "rdp_budget": account.rdp_budget,
        "reserve_fraction": 0.1,
        "reserve_epsilon": account.epsilon_spent(spent + share) - planned,
        "rule": "paper",
        "noise_schedule": (noise,) * ROUNDS,
        "reductions": tuple(reductions),
        "planned_runs": planned_runs,
        "runs_before": runs_before,
        "run_rdp_budget": spent + share,
        "policy_sha256": "9f3ab81c44d0" + "0" * 52,
        "validation": validation,
        "dataset_fingerprint": "f" * 64,
        "bytes_up_per_round": 412_000,
        "bytes_down_per_round": 412_000,
    }
    return DomainPlan(**{**values, **overrides})


def make_decision(domain, before, after, **overrides):
    values = {
        "domain": domain,
        "rule": "paper",
        "noise_before": before,
        "noise_after": after,
        "reason": "kept" if before == after else "lowered by gamma",
        "metric": "bertscore_f1",
        "value": 0.4812,
        "value_noised": True,
        "threshold": 0.5,
        "rounds_below": 2,
        "spent_rdp": 0.1,
        "run_rdp_budget": 1.0,
        "least_noise": 0.6,
        "remaining_steps": 24,
    }
    return NoiseDecision(**{**values, **overrides})


def make_private_summary(plans=None, shared_posts=(), decisions=None, private=True, **overrides):
    """Four rounds in which every domain keeps to its plan."""
    plans = plans or (make_private_plan(),)
    by_domain = {plan.domain: plan for plan in plans}

    def clients(k, lines):
        made = []
        for line in lines:
            plan = by_domain[line.domain]
            account = PrivacyAccount.of(plan)
            spent = account.rdp_budget * plan.runs_before / plan.planned_runs
            spent += account.charge_of(plan.noise_multiplier, plan.sample_rate, k * plan.steps_per_round)
            update = {
                "noise_multiplier": plan.noise_multiplier,
                "epsilon_spent": account.epsilon_spent(spent),
                "epsilon_budget": account.epsilon,
                "delta": account.delta,
            }
            made.append(line.model_copy(update=update))
        return made

    summary = make_summary(tuple(by_domain), rounds=ROUNDS, clients=clients, first=0, private=private)
    rounds = tuple(
        one.model_copy(update={"noise_changes": (), "noise_decisions": decisions(one.round_index) if decisions else ()})
        for one in summary.rounds
    )
    plan = StudyPlan(domains=tuple(plans), bytes_per_round=824_000, refusals=(), shared_posts=shared_posts)
    return summary.model_copy(update={"plan": plan, "rounds": rounds, **overrides})


def make_private_config(domains=("stress",), **privacy):
    config = make_config(domains, rounds=ROUNDS, **privacy)
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"gate_data": "private"})})


def make_view(domain="stress", **overrides):
    entries = ({"sha256": "0" * 64}, {"sha256": "ab12cd34ef56" + "7" * 52})
    return LedgerView(
        **{"domain": domain, "epsilon_spent": 3.9, "epsilon_budget": 4.0, "entries": entries, **overrides}
    )


def make_shared_posts():
    return SharedPosts(accounts=("stress", "wellbeing"), n_posts=41, epsilon_spent=9.4, epsilon_budget=12.0, delta=2e-5)
