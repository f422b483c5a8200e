"""How ``fedmentor up`` and prefect.yaml make room for sites: a pool, a deployment and a file for each, told to no other."""

from pathlib import Path

import yaml

from flows.stack import provisioning
from flows.stack.services import services
from flows.stack.settings import SiteSettings, StackSettings, parse_site
from flows.stack.state import StackFolder


def test_each_site_has_a_deployment_in_a_pool_of_its_own():
    described = yaml.safe_load(provisioning.PREFECT_FILE.read_text(encoding="utf-8"))
    own = {one["name"]: one["work_pool"]["name"] for one in described["deployments"]
           if one["entrypoint"] == provisioning.SITE_ENTRYPOINT}  # fmt: skip
    assert own == {"site-a": "site-a", "site-b": "site-b"}
    others = [one for one in described["deployments"] if one["entrypoint"] != provisioning.SITE_ENTRYPOINT]
    assert {one["work_pool"]["name"] for one in others} == {"server"}


def test_a_site_that_the_checkout_does_not_name_gets_a_deployment_too():
    assert provisioning._of_other_sites(StackSettings(sites=(SiteSettings(name="site-a"),))) is None
    made = provisioning._of_other_sites(StackSettings(sites=(SiteSettings(name="site-a"), SiteSettings(name="clinic"))))
    assert made is not None
    assert [(one["name"], one["work_pool"], one["entrypoint"]) for one in made["deployments"]] == [
        ("clinic", {"name": "clinic"}, provisioning.SITE_ENTRYPOINT)
    ]
    digests = {
        provisioning.deployment_digest(StackSettings(sites=tuple(SiteSettings(name=name) for name in names)))
        for names in ((), ("clinic",), ("clinic", "ward"))
    }
    assert len(digests) == 3, "a site that is added must be deployed"


def test_only_a_sites_own_worker_is_told_of_its_file(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FEDMENTOR_SITE_FILE", "someone's")
    file = tmp_path / "site.yaml"
    site = parse_site(f"site-a={file}")
    assert (site.site_file, site.data_root) == (file, None)
    settings = StackSettings(store="folder", sites=(site, SiteSettings(name="site-b")))
    made = services(settings, StackFolder(tmp_path / "stack"), None)
    told = {one.name: one.environment().get("FEDMENTOR_SITE_FILE") for one in made}
    assert told.pop("worker-site-a") == str(file)
    assert set(told.values()) == {None}


def test_the_form_of_a_request_has_no_field_for_a_path_or_a_secret():
    from prefect.utilities.callables import parameter_schema

    from flows.client_site import client_site

    schema = parameter_schema(client_site)
    assert set(schema.properties) == {"request"}
    requests = {name for name in schema.definitions if name.endswith("Request")}
    assert requests == {"PlanRequest", "TrainRequest", "EvaluateRequest"}
