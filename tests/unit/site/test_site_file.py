"""A site's own file: it completes a study, overrides it, and is never told to the server."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from two_sites import at_sites

from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import config_sha256, load_config, validate_config
from fedmentor_core.data.loading import load_study_data
from fedmentor_core.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DeadlineError,
    OutputExistsError,
    SharedPostsError,
)
from fedmentor_core.nights import check_nightly
from fedmentor_core.privacy.policy import load_policy, policy_of
from fedmentor_core.site.answering import told
from fedmentor_core.site.file import (
    VARIABLE,
    RequestRefusedError,
    at_site,
    load_site_file,
    site_file_of_environment,
)
from fedmentor_core.site.requests import PlanRequest, parse_request, told_to_site
from fedmentor_core.site.signing import make_key_file, read_key_file
from fedmentor_core.study_ref import find_study
from fedmentor_core.workspace import Workspace


@pytest.fixture
def study(tiny_study: dict, sites) -> dict:
    return at_sites(tiny_study, sites)


@pytest.fixture
def config(study) -> StudyConfig:
    return validate_config(study)


def asked(config: StudyConfig, domain: str = "one") -> StudyConfig:
    return told_to_site(config, config.domain(domain))


def test_the_file_completes_what_the_study_leaves_open(config, sites):
    sites.change("site-a", torch_threads=2, deadline_seconds=60.0)
    file = sites.file("site-a")
    made = at_site(asked(config), file)
    domain = made.domains[0]
    assert (domain.source.kind, domain.site) == ("invented", None)
    assert made.privacy.ledger_url == file.ledger_url
    assert made.storage.url == file.store.url
    assert made.execution.torch_threads == 2
    assert made.training.deadline_seconds == 60.0
    assert policy_of(made, domain).validation_epsilon == 50.0
    assert made.training.batch_size == config.training.batch_size


def test_what_a_server_wishes_never_replaces_what_the_site_says(study, sites):
    study["domains"][0]["shares_posts_with"] = ["another-account"]
    study["data"] = {"digest_key_variable": "HOME", "root": "/server/data"}
    study["privacy"] = {"ledger_url": "file:///server/ledgers"}
    study["training"]["deadline_seconds"] = 1e6
    study["evaluation"]["toxicity"] = {"trusted_sha256": ["0" * 64]}
    sites.change("site-a", deadline_seconds=60.0, max_composed_epsilon=9.0)
    made = at_site(asked(validate_config(study)), sites.file("site-a"))
    assert made.domains[0].shares_posts_with == ()
    assert made.data.digest_key_variable == "FEDMENTOR_UNIT_KEY"
    assert made.data.root == str(sites.folder / "site-a")
    assert made.privacy.ledger_url == (sites.folder / "site-a" / "ledger").as_uri()
    assert made.training.deadline_seconds == 60.0
    assert made.privacy.max_composed_epsilon == 9.0
    assert made.evaluation.toxicity.trusted_sha256 == ()


def test_private_posts_are_never_taken_for_public_ones(config, sites):
    raw = yaml.safe_load(sites.files["site-a"].read_text())
    del raw["domains"]["one"]["gate_data"]
    sites.files["site-a"].write_text(yaml.safe_dump(raw))
    with pytest.raises(RequestRefusedError, match="private"):
        at_site(asked(config), sites.file("site-a"))


def test_another_sites_domain_is_refused(config, sites):
    with pytest.raises(RequestRefusedError, match="does not hold"):
        at_site(asked(config, "two"), sites.file("site-a"))


def test_a_request_tells_a_site_no_place_and_no_other_domain(study):
    study |= {
        "storage": {"url": "s3://bucket/secret-place", "endpoint_url": "http://10.0.0.1:9000"},
        "tracking": {"uri": "http://mlflow.internal"},
        "data": {"root": "/server/data"},
        "privacy": {"ledger_url": "file:///server/ledgers"},
        "aggregation": {"min_clients": 2},
    }
    study["evaluation"]["thresholds"] = [{"metric": "safe_rate", "at_least": 0.5, "scope": "two"}]
    config = validate_config(study)
    request = PlanRequest(run_id="tiny-1", domain="one", config=asked(config), n_clients=2)
    text = request.model_dump_json()
    for place in ("secret-place", "10.0.0.1", "mlflow.internal", "/server", '"two"', "site-b"):
        assert place not in text
    assert parse_request(request.model_dump(mode="json")) == request


def test_requests_about_anything_else_are_no_requests(config):
    good = PlanRequest(run_id="tiny-1", domain="one", config=asked(config), n_clients=2).model_dump(mode="json")
    for wrong in ({"run_id": "../up"}, {"run_id": "a/b"}, {"domain": "two"}, {"kind": "delete"}, {"path": "/etc"},
                  {"config": config.model_dump(mode="json")}):  # fmt: skip
        with pytest.raises(ValidationError):
            parse_request(good | wrong)


def test_the_server_looks_at_what_it_has_and_reads_no_data(config, tmp_path, monkeypatch):
    monkeypatch.setattr("fedmentor_core.data.loading._read_source", lambda *_: pytest.fail("data was read"))
    workspace = Workspace(find_study(config, tmp_path / "out"))
    assert workspace.preflight().domains == ()
    with pytest.raises(ConfigError, match="sites must be asked first"):
        workspace.plan  # noqa: B018
    with pytest.raises(ConfigError, match="at its site"):
        load_study_data(config.domains, config.data)
    assert not (tmp_path / "out").exists()


def test_where_a_site_is_reached_is_no_part_of_what_a_study_computes(study):
    moved = study | {"sites": {name: one | {"deadline_seconds": 5.0} for name, one in study["sites"].items()}}
    assert config_sha256(validate_config(moved)) == config_sha256(validate_config(study))


@pytest.mark.parametrize(
    ("changes", "told_of"),
    [
        ({"site": None}, "goes with source.kind"),
        ({"source": {"kind": "invented", "corpus": "x", "n_units": 9}}, "goes with source.kind"),
        ({"site": "site-c"}, "no site site-c"),
        ({"policy_file": "x.yaml"}, "site's own file"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(study, changes, told_of):
    study["domains"][0] |= changes
    with pytest.raises(ConfigError, match=told_of):
        validate_config(study)


@pytest.mark.parametrize(
    ("changes", "told_of"),
    [
        ({"store": {}}, "store.url is required"),
        ({"password": "x"}, "unknown key"),
        ({"domains": {}}, "at least 1"),
        ({"domains": {"one": {"source": {"kind": "site"}, "policy_file": "p"}}}, "kind"),
    ],
)
def test_a_site_file_that_cannot_be_is_refused(sites, changes, told_of):
    sites.change("site-a", **changes)
    with pytest.raises(ConfigError, match=told_of):
        sites.file("site-a")


def test_a_ledger_where_others_read_is_refused(sites):
    file = sites.file("site-a")
    sites.change("site-a", ledger_url=f"{file.store.url}/ledgers")
    with pytest.raises(ConfigError, match="site alone reads"):
        sites.file("site-a")


def test_a_process_that_belongs_to_no_site_carries_out_nothing(sites):
    with pytest.raises(ConfigError, match=VARIABLE):
        site_file_of_environment({})
    assert site_file_of_environment({VARIABLE: str(sites.files["site-a"])}) == load_site_file(sites.files["site-a"])


def test_a_key_is_its_owners_alone_and_never_replaced(tmp_path: Path):
    path = tmp_path / "site.key"
    public = make_key_file(path)
    secret = path.read_text().strip()
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret not in public
    with pytest.raises(OutputExistsError):
        make_key_file(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="0640") as refused:
        read_key_file(path)
    assert secret not in str(refused.value)
    path.chmod(0o600)
    path.write_text("not a key")
    with pytest.raises(ConfigError, match="64 hex digits"):
        read_key_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_file(tmp_path / "missing")


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (BudgetError("domain 'one': lifetime epsilon 8 is spent"), True),
        (DeadlineError("past 60 s"), True),
        (RequestRefusedError("not this domain"), True),
        (SharedPostsError("83% of its posts are also in account 'b'"), False),
        (DataError("/srv/hospital/posts.csv: row 17 has no answer"), False),
        (ConfigError("policy file /srv/hospital/policy.yaml"), False),
        (ValueError("a sentence of a patient"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_server_hears_of_a_failure(error, is_told):
    failure = told(error)
    assert failure.kind == type(error).__name__
    assert (str(error) in failure.reason) is is_told


def test_the_examples_are_valid():
    root = Path(__file__).resolve().parents[3]
    file = load_site_file(root / "infra" / "sites" / "site_example.yaml")
    config = load_config(root / "infra" / "configs" / "two_sites.yaml")
    made = at_site(asked(config, "crisis-line"), file)
    assert made.domains[0].source.kind == "csv"
    assert made.storage.url == "s3://fedmentor-site-a/store"


def test_the_sites_of_the_nightly_example_fit_their_study():
    root = Path(__file__).resolve().parents[3]
    config = load_config(root / "infra" / "configs" / "nightly_two_sites.yaml")
    check_nightly(config)
    for domain in config.domains:
        file = load_site_file(root / "infra" / "sites" / "two_sites" / domain.site / "site.yaml")
        made = at_site(told_to_site(config, domain), file)
        policy = load_policy(made.domains[0].policy_file, domain.name)
        assert policy.epsilon == config.epsilon_of(domain)
        assert file.written.url == config.sites[domain.site].store_url
        assert file.ledger_url == (root / "infra" / "sites" / "two_sites" / domain.site / "ledgers").as_uri()
