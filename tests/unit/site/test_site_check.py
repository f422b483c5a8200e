"""``fedmentor site``: what a site's people see before their site takes part."""

import json

import pytest
from typer.testing import CliRunner

from flows.cli import app

runner = CliRunner()


def found(*arguments: str) -> dict[str, dict]:
    done = runner.invoke(app, ["site", "check", "--json", *arguments])
    assert done.exit_code in (0, 3), done.output
    made = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.exit_code == (3 if any(check["status"] == "fail" for check in made.values()) else 0)
    return made


def test_a_site_that_is_ready_passes_every_check(sites):
    checks = found("--file", str(sites.files["site-a"]))
    assert {check["status"] for check in checks.values()} == {"pass"}
    assert sites.public_keys["site-a"] in checks["signing key"]["found"]
    assert "epsilon 8" in checks["one: policy"]["found"]
    assert "units" in checks["one: data"]["found"]


@pytest.mark.parametrize(
    ("spoil", "failed"),
    [
        (lambda place: (place / "site.key").chmod(0o644), "signing key"),
        (lambda place: (place / "policy.yaml").write_text("domain: two\nepsilon: 1\n"), "one: policy"),
        (lambda place: (place / "policy.yaml").unlink(), "one: policy"),
    ],
)
def test_what_is_wrong_is_named_and_the_rest_is_still_looked_at(sites, spoil, failed):
    spoil(sites.folder / "site-a")
    checks = found("--file", str(sites.files["site-a"]))
    assert [name for name, check in checks.items() if check["status"] == "fail"] == [failed]
    assert checks[failed]["remedy"]


def test_a_file_of_the_environment_is_found(sites, monkeypatch):
    monkeypatch.setenv("FEDMENTOR_SITE_FILE", str(sites.files["site-b"]))
    assert "two: data" in found()
    monkeypatch.delenv("FEDMENTOR_SITE_FILE")
    assert runner.invoke(app, ["site", "check"]).exit_code != 0


def test_keygen_prints_the_public_key_alone(tmp_path):
    path = tmp_path / "site.key"
    done = runner.invoke(app, ["site", "keygen", "--out", str(path)])
    assert done.exit_code == 0
    assert len(bytes.fromhex(done.stdout.strip())) == 32
    assert path.read_text().strip() not in done.stdout
