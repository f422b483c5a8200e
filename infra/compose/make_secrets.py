"""Make the secret files of the compose deployment: random passwords, store identities, a certificate for the gateway.

    python infra/compose/make_secrets.py --site site-a --site site-b --host fedmentor.example.org

What exists stays: run it again to add a site. To rotate a secret, delete its file, run this, and follow
docs/runbook.md. The folder is readable by its owner only. The files in it are readable by all, because a container's
user, who is nobody on this machine, reads the one file that is mounted for it; nobody else gets past the folder.
"""

import argparse
import json
import secrets
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from string import Template
from typing import Any

BUCKET = "fedmentor"
POLICIES = Path(__file__).resolve().parents[1] / "policies"
_SEAWEEDFS_ACTIONS = {
    "s3:GetObject": "Read",
    "s3:PutObject": "Write",
    "s3:DeleteObject": "Write",
    "s3:AbortMultipartUpload": "Write",
    "s3:ListBucket": "List",
    "s3:CreateBucket": "Admin",
    "s3:PutBucketPolicy": "Admin",
    "s3:PutLifecycleConfiguration": "Admin",
}
_DAYS = 825


def rendered_policy(name: str, sites: Sequence[str], bucket: str = BUCKET) -> dict[str, Any]:
    """A policy of ``infra/policies`` for these sites: a resource that names ``${site}`` is repeated for each.

    Args:
        name: file name without its ending, such as ``store_site``.
        sites: the one site that the identity belongs to, or all of them for the server.
        bucket: the common part of the buckets' names.
    """
    policy: dict[str, Any] = json.loads((POLICIES / f"{name}.json").read_text(encoding="utf-8"))
    for statement in policy["Statement"]:
        statement["Resource"] = list(
            dict.fromkeys(
                Template(resource).substitute(bucket=bucket, site=site)
                for resource in statement["Resource"]
                for site in (sites if "${site}" in resource else sites[:1])
            )
        )
    return policy


def seaweedfs_actions(policy: Mapping[str, Any]) -> list[str]:
    """The allowed part of a policy in SeaweedFS's words: ``Read:bucket/prefix*``.

    They are coarser than the policy: a prefix ends where the first ``*`` stands, ``Write`` also deletes (which
    ``bucket_nothing_deleted.json`` takes back), and who may make a bucket may use it. What a policy denies is not
    granted here, so it needs no word.

    Raises:
        ValueError: an action that has no counterpart.
    """
    found: list[str] = []
    for statement in policy["Statement"]:
        if statement["Effect"] != "Allow":
            continue
        for action in statement["Action"]:
            if action not in _SEAWEEDFS_ACTIONS:
                raise ValueError(f"{action}: no such action in SeaweedFS; known: {', '.join(_SEAWEEDFS_ACTIONS)}")
            for resource in statement["Resource"]:
                place = resource.removeprefix("arn:aws:s3:::")
                place = place if "*" not in place else place[: place.index("*")] + "*"
                found.append(f"{_SEAWEEDFS_ACTIONS[action]}:{place}")
    return list(dict.fromkeys(found))


def make_secrets(folder: Path, sites: Sequence[str], hosts: Sequence[str]) -> list[str]:
    """Write what is missing and return the names of the files that were written.

    Args:
        folder: the folder of the secrets; made if need be, mode 0700.
        sites: names of the sites, such as ``site-a``.
        hosts: further names of the gateway in its certificate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(stat.S_IRWXU)
    made = _Folder(folder)
    for name in ("postgres_password", "prefect_password", "mlflow_password", "mlflow_auth_password",
                 "messaging_password", "mlflow_flask_key", "mlflow_admin_password", "mlflow_trainer_password",
                 "mlflow_consumer_password", "grafana_admin_password"):  # fmt: skip
        made.write(name, lambda: secrets.token_urlsafe(32))
    made.write("prefect_auth", lambda: f"fedmentor:{secrets.token_urlsafe(32)}")
    made.write("prefect_database_url", lambda: _url("postgresql+asyncpg", "prefect", made.read("prefect_password")))
    made.write("mlflow_database_url", lambda: _url("postgresql+psycopg2", "mlflow", made.read("mlflow_password")))
    password = made.read("messaging_password")
    made.write("messaging_config", lambda: f"requirepass {password}\nappendonly yes\ndir /data")
    made.write("messaging_url", lambda: f"redis://:{password}@messaging:6379/1")
    made.write("mlflow_auth", lambda: _mlflow_auth(made))
    made.write("postgres_init", lambda: _roles(made))
    for site in sites:
        made.write(f"unit_key_{_file(site)}", lambda: secrets.token_hex(32))
    _store_identities(made, sites)
    if not {"gateway_ca", "gateway_certificate", "gateway_key"} <= made.names:
        for name, content in _certificates(hosts).items():
            made.replace(name, content)
    return made.written


class _Folder:
    """The folder of the secrets: what is there stays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: list[str] = []

    @property
    def names(self) -> set[str]:
        return {one.name for one in self.path.iterdir()}

    def read(self, name: str) -> str:
        return (self.path / name).read_text(encoding="utf-8").strip()

    def write(self, name: str, content: Callable[[], str]) -> None:
        if not (self.path / name).exists():
            self.replace(name, content())

    def replace(self, name: str, content: str) -> None:
        path = self.path / name
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(content if content.endswith("\n") else content + "\n", encoding="utf-8")
        path.chmod(0o444)
        self.written.append(name)


def _file(site: str) -> str:
    return site.replace("-", "_")


def _url(scheme: str, database: str, password: str) -> str:
    return f"{scheme}://{database}:{password}@postgres:5432/{database}"


def _mlflow_auth(made: _Folder) -> str:
    return (
        "[mlflow]\n"
        "default_permission = NO_PERMISSIONS\n"
        f"database_uri = {_url('postgresql+psycopg2', 'mlflow_auth', made.read('mlflow_auth_password'))}\n"
        "admin_username = admin\n"
        f"admin_password = {made.read('mlflow_admin_password')}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "grant_default_workspace_access = false\n"
    )


def _roles(made: _Folder) -> str:
    lines = []
    for name in ("prefect", "mlflow", "mlflow_auth"):
        lines += [
            f"CREATE ROLE {name} LOGIN PASSWORD '{made.read(f'{name}_password')}';",
            f"CREATE DATABASE {name} OWNER {name};",
            f"REVOKE ALL ON DATABASE {name} FROM PUBLIC;",
        ]
    return "\n".join(lines)


def _store_identities(made: _Folder, sites: Sequence[str]) -> None:
    """A key for each user of the store, in a file of its own, and all of them with their rights for the store."""
    users = {
        "store_server": ("store_server", sites),
        "store_mlflow": ("store_mlflow", sites),
        "store_bootstrap": ("store_bootstrap", sites),
        "store_monitor_server": ("store_monitor", ("server",)),
        **{f"store_{_file(site)}": ("store_site", (site,)) for site in sites},
        **{f"store_monitor_{_file(site)}": ("store_monitor", (site,)) for site in sites},
    }
    identities = []
    for user, (policy, its_sites) in users.items():
        made.write(user, _credentials)
        key = dict(line.split(" = ") for line in made.read(user).splitlines()[1:])
        identities.append(
            {
                "name": user,
                "credentials": [{"accessKey": key["aws_access_key_id"], "secretKey": key["aws_secret_access_key"]}],
                "actions": seaweedfs_actions(rendered_policy(policy, its_sites)),
            }
        )
    content = json.dumps({"identities": identities}, indent=2)
    if "store_identities" not in made.names or made.read("store_identities") != content:
        made.replace("store_identities", content)


def _credentials() -> str:
    lines = ("[default]", f"aws_access_key_id = {secrets.token_hex(10).upper()}",
             f"aws_secret_access_key = {secrets.token_urlsafe(32)}", "region = us-east-1")  # fmt: skip
    return "\n".join(lines)


def _certificates(hosts: Sequence[str]) -> dict[str, str]:
    """A certificate authority for this deployment, whose own key is thrown away, and the gateway's certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now, names = datetime.now(UTC), ("gateway", "localhost", *hosts)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(subject: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("fedmentor deployment"))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=_DAYS))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
        )

    authority = (
        builder("fedmentor deployment", authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        builder("gateway", key.public_key())
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return {
        "gateway_ca": authority.public_bytes(pem).decode(),
        "gateway_certificate": certificate.public_bytes(pem).decode(),
        "gateway_key": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode(),
    }


def _usage(*, authority: bool) -> Any:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=authority, crl_sign=authority, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--site", action="append", required=True, help="Name of a site. Repeatable.")
    parser.add_argument(
        "--host", action="append", default=[], help="A name by which sites reach the gateway. Repeatable."
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "secrets")
    given = parser.parse_args(arguments)
    written = make_secrets(given.out, given.site, given.host)
    print(f"{given.out}: wrote {', '.join(written) or 'nothing, all is there'}")


if __name__ == "__main__":
    main(sys.argv[1:])
