"""The doctor against a good server, a directory, and servers that lack one thing each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from typer.testing import CliRunner

from fedmentor_core.check import Diagnosis
from fedmentor_core.config import StorageConfig
from fedmentor_core.machine import examine_machine
from fedmentor_core.storage import probe
from fedmentor_core.storage.base import open_store
from fedmentor_core.storage.probe import probe_store
from flows import cli


def statuses(diagnosis: Diagnosis) -> dict[str, str]:
    return {check.name: check.status for check in diagnosis.checks}


def test_good_server_passes_and_is_left_clean(bucket: str, s3_endpoint: str, raw: Any) -> None:
    raw.put_object(Bucket=bucket, Key="p/mine", Body=b"kept")
    found = probe_store(f"s3://{bucket}/p", StorageConfig(endpoint_url=s3_endpoint))
    by_name = statuses(found)
    assert by_name.pop("upload checksum") in ("warn", "pass"), "this server takes wrong digests"
    assert set(by_name.values()) == {"pass"}, found
    assert found.passed
    assert found.left == ()
    assert [item["Key"] for item in raw.list_objects_v2(Bucket=bucket)["Contents"]] == ["p/mine"]
    assert "Uploads" not in raw.list_multipart_uploads(Bucket=bucket)


def test_directory_passes_and_is_left_clean(tmp_path: Path) -> None:
    found = probe_store(tmp_path.as_uri(), StorageConfig())
    assert found.passed, found
    assert found.left == ()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


LACKS = {
    "conditions": ("before-call.s3.PutObject", "If-None-Match", {"conditional create", "one winner of a race"}),
    "compare-and-swap": ("before-call.s3.PutObject", "If-Match", {"compare-and-swap"}),
    "ranges": ("before-call.s3.GetObject", "Range", {"ranged read"}),
    "conditional assembly": ("before-call.s3.CompleteMultipartUpload", "If-None-Match", {"multipart upload"}),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_a_server_ignores_is_found(
    bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    event, header, failing = LACKS[lack]

    def forgetful(url: str, settings: StorageConfig) -> Any:
        store: Any = open_store(url, settings)

        def forget(params: dict[str, Any], **_: Any) -> None:
            params["headers"].pop(header, None)

        store.client.boto.meta.events.register(event, forget)
        return store

    monkeypatch.setattr(probe, "open_store", forgetful)
    found = probe_store(f"s3://{bucket}", StorageConfig(endpoint_url=s3_endpoint))
    assert {name for name, status in statuses(found).items() if status == "fail"} == failing
    assert not found.passed
    for check in found.checks:
        if check.status != "pass":
            assert check.remedy
            assert check.why


def test_missing_bucket_stops_the_doctor(s3_endpoint: str) -> None:
    found = probe_store("s3://no-such-bucket", StorageConfig(endpoint_url=s3_endpoint))
    assert statuses(found) == {"bucket": "fail"}
    assert "NoSuchBucket" in found.checks[0].found


def test_no_right_to_delete_is_fine_and_said(bucket: str, proxy: FaultProxy) -> None:
    proxy.inject(Fault("status", "^DELETE .*doctor-[^?]*$", status=403, code="AccessDenied", times=999))
    found = probe_store(f"s3://{bucket}/p", StorageConfig(endpoint_url=proxy.url))
    assert found.passed, found
    assert len(found.left) > 5
    assert all(re.match(r"p/\.fedmentor/doctor-", key) for key in found.left)
    proxy.clear()
    assert list(open_store(f"s3://{bucket}/p", StorageConfig(endpoint_url=proxy.url)).list_keys("")) == []


def test_unfinished_uploads_are_counted(bucket: str, s3_endpoint: str, raw: Any) -> None:
    raw.create_multipart_upload(Bucket=bucket, Key="p/torn")
    found = probe_store(f"s3://{bucket}/p", StorageConfig(endpoint_url=s3_endpoint))
    (check,) = (check for check in found.checks if check.name == "unfinished uploads")
    assert (check.status, check.found) == ("warn", "1 found")
    assert found.passed


@pytest.mark.parametrize(("seconds", "status"), [(0, "pass"), (100, "warn"), (5000, "fail"), (-5000, "fail")])
def test_clock_skew(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, seconds: int, status: str) -> None:
    real = probe.clock_skew_seconds
    monkeypatch.setattr(probe, "clock_skew_seconds", lambda response: (real(response) or 0.0) + seconds)
    found = probe_store(f"s3://{bucket}", StorageConfig(endpoint_url=s3_endpoint))
    assert statuses(found)["clock"] == status


def test_command_line(bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "200"})
    good = runner.invoke(cli.app, ["doctor", "--store", f"s3://{bucket}", "--endpoint-url", s3_endpoint, "--json"])
    assert good.exit_code == 0, good.output
    said = json.loads(good.stdout)
    assert said["passed"] is True
    assert said["subject"] == f"s3://{bucket}"
    assert {"name", "status", "found", "why", "remedy"} <= set(said["checks"][0])
    bad = runner.invoke(cli.app, ["doctor", "--store", "s3://absent", "--endpoint-url", s3_endpoint])
    assert bad.exit_code == 3
    assert "Create the bucket" in bad.stdout
    machine = runner.invoke(cli.app, ["doctor", "--json"])
    assert machine.exit_code == 0, machine.output
    assert {"python", "torch", "gpu", "memory", "disk", "versions"} == {
        one["name"] for one in json.loads(machine.stdout)["checks"]
    }
    told = runner.invoke(cli.app, ["doctor", "--help"])
    assert "Example" in told.stdout


@pytest.mark.parametrize("options", [["--endpoint-url", "http://user:pw@host"], ["--addressing-style", "odd"]])
def test_bad_option_is_said_without_quoting_it(options: list[str]) -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--store", "s3://b", *options])
    assert type(result.exception).__name__ == "ConfigError"
    assert "pw" not in str(result.exception)


def test_other_versions_are_named(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# words\nboto3==0.0.1\nnot-installed-at-all==1\n")
    (check,) = (check for check in examine_machine(tmp_path, pins).checks if check.name == "versions")
    assert check.status == "warn"
    assert re.search(r"boto3 \S+ \(tested: 0\.0\.1\)", check.found)
    assert "not-installed" not in check.found
