"""The stack's own S3-compatible server: SeaweedFS from its wheel. It keeps what it holds, and asks for credentials.

The server's flows may read and write the whole bucket. A site may write below its own prefix, read what the server
wrote, and nothing of another site's.
"""

import json
import secrets
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from fedmentor_core.errors import ConfigError
from flows.stack.settings import HOST, SERVER_POOL, StackSettings

INNER_PORTS = 7
_IDENTITIES = "identities.json"


@dataclass(frozen=True)
class ObjectStore:
    """Where the server keeps its data and who may use it; ``home`` is readable by its owner only."""

    home: Path
    settings: StackSettings

    def command(self) -> tuple[str, ...]:
        """The server with its parts, every port of it on the loopback address, telemetry off."""
        port = self.settings.s3_port
        origin = f"http://{HOST}:{port}"
        return (
            str(_program() or "weed"), "server", f"-dir={self.home / 'data'}", f"-ip={HOST}", f"-ip.bind={HOST}",
            "-master.telemetry=false", f"-master.port={port + 1}", f"-master.port.grpc={port + 2}",
            "-master.volumeSizeLimitMB=256", "-volume.max=0", f"-volume.port={port + 3}",
            f"-volume.port.grpc={port + 4}", "-filer", f"-filer.port={port + 5}", f"-filer.port.grpc={port + 6}",
            "-filer.disableHttp", f"-filer.localSocket={self.home / 'filer.sock'}", f"-filer.allowedOrigins={origin}",
            "-s3", f"-s3.port={port}", f"-s3.port.grpc={port + 7}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-s3.iam=false", "-s3.autoCreateBucket=false", f"-s3.allowedOrigins={origin}",
            f"-s3.localSocket={self.home / 's3.sock'}", f"-s3.config={self.home / _IDENTITIES}",
        )  # fmt: skip

    def credentials_file(self, pool: str) -> Path:
        """NAME=VALUE lines with the credentials of a pool's worker, mode 0600."""
        return self.home / f"{pool}.env"

    def prepare(self) -> None:
        """Make folders, and credentials for every pool that has none yet; those that exist stay as they are.

        Raises:
            ConfigError: the server's program is not installed.
        """
        if _program() is None:
            raise ConfigError(
                "the stack's S3-compatible server (SeaweedFS) is not installed. Run: pip install 'fedmentor[stack]', "
                "or name a server that runs already with --s3-endpoint URL, or keep artifacts in folders with "
                "--store folder."
            )
        (self.home / "data").mkdir(parents=True, exist_ok=True, mode=0o700)
        identities = [self._identity(pool) for pool in self.settings.pools]
        _write_privately(self.home / _IDENTITIES, json.dumps({"identities": identities}, indent=2))

    def read_credentials(self, pool: str) -> dict[str, str]:
        """The variables of ``credentials_file``."""
        lines = self.credentials_file(pool).read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def _identity(self, pool: str) -> dict[str, object]:
        path = self.credentials_file(pool)
        if not path.exists():
            key, secret = f"{pool}-{secrets.token_hex(6)}", secrets.token_urlsafe(32)
            _write_privately(
                path, f"AWS_ACCESS_KEY_ID={key}\nAWS_SECRET_ACCESS_KEY={secret}\nAWS_DEFAULT_REGION=us-east-1\n"
            )
        found = self.read_credentials(pool)
        return {
            "name": pool,
            "credentials": [{"accessKey": found["AWS_ACCESS_KEY_ID"], "secretKey": found["AWS_SECRET_ACCESS_KEY"]}],
            "actions": self._actions(pool),
        }

    def _actions(self, pool: str) -> list[str]:
        bucket = self.settings.s3_bucket
        if pool == SERVER_POOL:
            return ["Admin", "Read", "List", "Tagging", "Write"]
        server, own = f"{bucket}/{SERVER_POOL}/*", f"{bucket}/sites/{pool}/*"
        return [f"Read:{server}", f"List:{server}", f"Read:{own}", f"List:{own}", f"Write:{own}"]


def _program() -> Path | None:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    return None if found is None else Path(found)


def _write_privately(path: Path, text: str) -> None:
    scratch = path.with_suffix(path.suffix + ".part")
    scratch.touch(mode=0o600)
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
