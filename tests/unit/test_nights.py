"""When a night is skipped, what may run every night, and the forecast of nights."""

import pytest

from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from fedmentor_core.nights import NightReport, check_nightly, domain_nights, domains_with_news, why_not_tonight
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.plan import plan_domain
from fedmentor_core.records import ClientSummary, EvaluationMetrics, GateSummary, Metrics, RoundSummary, StudyPlan

NIGHTS = 5
METRICS = Metrics(
    bertscore_f1=0.5, rouge_l=0.5, label_f1=0.5, safe_rate=1.0, toxicity_mean=0.0, toxicity_max=None, empty_rate=0.0,
    n_examples=1,
)  # fmt: skip


@pytest.fixture
def study() -> dict:
    return {
        "name": "nights",
        "rounds": 1,
        "domains": [{"name": "one", "source": {"kind": "invented", "corpus": "peer_forum", "n_units": 60}, "epsilon": 8}],
        "training": {"steps_per_round": 4, "batch_size": 8},
        "privacy": {"planned_runs": NIGHTS},
        "adaptation": {"rule": "fixed"},
        "evaluation": {
            "gate_data": "public",
            "thresholds": [{"metric": "safe_rate", "at_least": 0.99, "relative_to": "champion"}],
        },
    }  # fmt: skip


def plan(study: dict, *, spent: float = 0.0, runs: int = 0, account: PrivacyAccount | None = None) -> StudyPlan:
    config = validate_config(study)
    domain = plan_domain(
        config, config.domains[0], n_units=40, dataset_fingerprint="f" * 64, bytes_up=1, bytes_down=1, with_prv=False,
        account_in_force=account, spent_rdp=spent, runs_before=runs,
    )  # fmt: skip
    return StudyPlan(domains=(domain,), bytes_per_round=2, refusals=domain.refusals)


def night(made: StudyPlan, noise: float | None = None) -> tuple[RoundSummary, float]:
    """A round at the planned noise (or another), and the RDP that is spent after it."""
    domain = made.domains[0]
    account = PrivacyAccount.of(domain)
    noise = noise or domain.noise_multiplier
    spent = domain.spent_rdp_before + account.charge_of(noise, domain.sample_rate, domain.steps_per_round)
    client = ClientSummary(
        domain="one", status="trained", n_units=40, sample_rate=domain.sample_rate, steps=4, noise_multiplier=noise,
        clip_norm=1.0, epsilon_spent=account.epsilon_spent(spent), epsilon_budget=8.0, delta=domain.delta, bytes_up=1,
        bytes_down=1, seconds=1.0,
    )  # fmt: skip
    summary = RoundSummary(
        round_index=0, clients=(client,), metrics=EvaluationMetrics(**METRICS.model_dump(), by_domain={"one": METRICS}),
        gate=GateSummary(passed=True, reasons=()), noise_changes=(), bytes_total=2, seconds=1.0,
    )  # fmt: skip
    return summary, spent


def test_the_forecast_counts_down_to_the_last_planned_night(study):
    study["privacy"]["reserve_fraction"] = 0.0
    spent, account, left = 0.0, None, []
    for number in range(NIGHTS):
        made = plan(study, spent=spent, runs=number, account=account)
        account = PrivacyAccount.of(made.domains[0])
        assert why_not_tonight(made, frozenset({"one"}), None, validate_config(study)) is None
        summary, spent = night(made)
        one = domain_nights(made, frozenset({"one"}), (summary,))[0]
        assert one.epsilon_spent <= one.epsilon_limit * (1 + 1e-9)
        left.append((one.nights_left, one.planned_nights_left))
    assert [planned for _, planned in left] == [4, 3, 2, 1, 0]
    assert all(planned - 1 <= nights <= planned for nights, planned in left), "a share rounded down may cost a night"


def test_a_dear_night_shortens_the_forecast(study):
    made = plan(study)
    cheap, _ = night(made)
    dear, _ = night(made, made.domains[0].noise_multiplier * 0.6)
    nights = [domain_nights(made, frozenset(), (one,))[0].nights_left for one in (cheap, dear)]
    assert nights[1] < nights[0] <= NIGHTS - 1


def test_a_night_without_training_forecasts_as_planned(study):
    one = domain_nights(plan(study), frozenset())[0]
    assert (one.nights_left, one.planned_nights_left, one.new_data) == (None, NIGHTS, False)
    report = NightReport(night="2026-01-01-1", study="s", outcome="nothing_new", reason="why", domains=(one,))
    assert str(report) == "Night 2026-01-01-1 skipped: nothing new to train on (why). Budget left for 5 more nights."


def test_nothing_new_and_no_budget_are_told_apart(study):
    made = plan(study)
    outcome, reason = why_not_tonight(made, frozenset(), "7", validate_config(study))
    assert (outcome, reason) == ("nothing_new", "no domain has new units since the data of champion version 7")
    account = PrivacyAccount.of(made.domains[0])
    over = plan(study, spent=account.rdp_budget * 0.9, runs=NIGHTS, account=account)
    outcome, reason = why_not_tonight(over, frozenset({"one"}), "7", validate_config(study))
    assert outcome == "no_budget"
    assert "all 5 planned runs have charged its budget" in reason
    assert "raise privacy.planned_runs" in reason
    broke = plan(study, spent=account.rdp_budget * (1 - 1e-9), runs=1, account=account)
    outcome, reason = why_not_tonight(broke, frozenset({"one"}), None, validate_config(study))
    assert outcome == "no_budget"
    assert "too small" in reason


def test_news_are_fingerprints_that_differ_and_domains_that_are_new():
    now = {"a": "1", "b": "2", "c": "3"}
    assert domains_with_news(now, {"a": "1", "b": "9"}) == {"b", "c"}
    assert domains_with_news(now, now) == frozenset()
    assert domains_with_news(now, None) == {"a", "b", "c"}, "without a champion everything is new"


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("domains", [{"name": "one", "epsilon": 8, "source": {"kind": "dreaddit"}}], r"privacy\.ledger_url is not set"),
        ("evaluation", {"gate_data": "public"}, "compares nothing with the champion"),
    ],
)
def test_what_cannot_be_repeated_every_night(study, section, change, message):
    check_nightly(validate_config(study))
    with pytest.raises(ConfigError, match=message):
        check_nightly(validate_config({**study, section: change}))


def test_the_champion_needs_a_registry(study):
    with pytest.raises(ConfigError, match=r"set tracking\.enabled to true"):
        validate_config({**study, "tracking": {"enabled": False}})


def over_sites(study: dict) -> dict:
    """The study with a second domain, and both at sites."""
    domains = [study["domains"][0] | {"name": name, "source": {"kind": "site"}, "site": f"of-{name}"} for name in
               ("one", "two")]  # fmt: skip
    return study | {"domains": domains, "sites": {f"of-{name}": {"public_key": "a" * 64} for name in ("one", "two")}}


def test_a_night_without_one_of_its_sites_is_skipped_before_the_others_pay(study):
    config = validate_config(over_sites(study))
    here = plan(study)
    absent = here.model_copy(update={"warnings": ("domain 'two' takes no part in this run: site 'of-two' is down.",)})
    outcome, reason = why_not_tonight(absent, frozenset({"one"}), "7", config)
    assert (outcome, reason) == ("site_down", "domain 'two' takes no part in this run: site 'of-two' is down")
    spent = here.domains[0].model_copy(update={"domain": "two", "refusals": ("domain 'two': its budget is spent.",)})
    both = here.model_copy(update={"domains": (*here.domains, spent)})
    outcome, reason = why_not_tonight(both, frozenset({"one"}), "7", config)
    assert (outcome, reason) == ("no_budget", "domain 'two': its budget is spent")
