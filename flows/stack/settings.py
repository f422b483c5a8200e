"""What a one-machine stack is made of: ports, database, sites. Secrets are never part of it."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmentor_core.errors import ConfigError, FedMentorError

HOST = "127.0.0.1"
SERVER_POOL = "server"
POSTGRES_VARIABLE = "FEDMENTOR_POSTGRES_URL"

Port = Annotated[int, Field(ge=1, le=65535)]


class StackError(FedMentorError):
    """A part of the stack that does not start, answer or stop."""


class SiteSettings(BaseModel):
    """One site: its own work pool, and its own worker with its own environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$", description="Name of the site and of its work pool.")
    data_root: Path | None = Field(default=None, description="Folder with the site's data; only its worker is told.")
    site_file: Path | None = Field(
        default=None, description="The site's own file (docs/sites.md); only its worker is told where it is."
    )
    env: dict[str, str] = Field(default={}, description="Further variables of this site's worker. No secrets here.")
    env_file: Path | None = Field(default=None, description="NAME=VALUE lines with the site's credentials.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == SERVER_POOL:
            raise ValueError(f"a site cannot be called {SERVER_POOL!r}: that is the pool of the server's own flows")
        return self


class StackSettings(BaseModel):
    """Settings of one stack. They are kept in its ``stack.json``, so nothing here may be a secret."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefect_port: Port = Field(default=4200, description="Prefect's API and pages.")
    mlflow_port: Port = Field(default=5000, description="MLflow's API and pages.")
    store: Literal["s3", "folder"] = Field(
        default="s3", description="Where artifacts go: the S3-compatible server, or folders below the stack's own."
    )
    s3_port: Annotated[int, Field(ge=1, le=65528)] = Field(
        default=9000, description="The stack's S3-compatible server; its parts take the seven ports that follow."
    )
    s3_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/@]+/?$",
        description="An S3-compatible server that runs already, instead of the stack's own.",
    )
    s3_bucket: str = Field(default="fedmentor", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    database: Literal["sqlite", "postgresql"] = Field(default="sqlite", description="Of Prefect and of MLflow.")
    database_prefix: str = Field(
        default="fedmentor",
        pattern=r"^[a-z][a-z0-9_]{0,40}$",
        description="PostgreSQL databases are called PREFIX_prefect and PREFIX_mlflow.",
    )
    sites: tuple[SiteSettings, ...] = Field(default=())
    studies: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")], Path] = Field(
        default={}, description="Study files (YAML) of deployments, by deployment, in place of those of prefect.yaml."
    )
    start_timeout_seconds: float = Field(default=240.0, gt=0, description="For each service to answer.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        ports = [self.prefect_port, self.mlflow_port, *self.s3_ports]
        if len(set(ports)) < len(ports):
            raise ValueError(
                "prefect_port, mlflow_port and s3_port to s3_port + 7 must differ; got "
                f"{self.prefect_port}, {self.mlflow_port} and {self.s3_port}"
            )
        if self.store == "folder" and self.s3_endpoint is not None:
            raise ValueError("s3_endpoint goes with store 's3'; got store 'folder'")
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            raise ValueError(f"each site once; got {names}")
        return self

    @property
    def pools(self) -> tuple[str, ...]:
        """Work pools, the server's own first."""
        return (SERVER_POOL, *(site.name for site in self.sites))

    @property
    def starts_s3(self) -> bool:
        """Whether the stack runs an S3-compatible server of its own."""
        return self.store == "s3" and self.s3_endpoint is None

    @property
    def s3_ports(self) -> tuple[int, ...]:
        """Ports of the stack's own S3-compatible server, the one that answers S3 first."""
        return tuple(range(self.s3_port, self.s3_port + 8)) if self.starts_s3 else ()

    @property
    def prefect_api_url(self) -> str:
        """Where flows and workers find Prefect."""
        return f"http://{HOST}:{self.prefect_port}/api"

    @property
    def mlflow_url(self) -> str:
        """MLflow's tracking URI."""
        return f"http://{HOST}:{self.mlflow_port}"

    @property
    def s3_url(self) -> str | None:
        """The S3-compatible endpoint, the stack's own or the one that was given; None where artifacts go to folders."""
        if self.store == "folder":
            return None
        return (self.s3_endpoint or f"http://{HOST}:{self.s3_port}").rstrip("/")


def load_settings(path: Path) -> StackSettings:
    """Read settings from a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown key or an impossible value.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read stack settings {path}: {type(error).__name__}. Give a YAML file.") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path} must hold keys and values; allowed keys: {', '.join(StackSettings.model_fields)}.")
    return checked_settings(content or {}, str(path))


def checked_settings(values: dict[str, object], source: str) -> StackSettings:
    """Validate settings that a user gave.

    Raises:
        ConfigError: naming every key that is wrong and where it came from.
    """
    try:
        return StackSettings.model_validate(values)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'settings'}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"{source}: {found}. Allowed keys: {', '.join(StackSettings.model_fields)}.") from None


def parse_site(text: str) -> SiteSettings:
    """Read ``NAME``, ``NAME=DATA_FOLDER`` or ``NAME=SITE_FILE``, which ends in ``.yaml`` or ``.yml``.

    Raises:
        ConfigError: the name is not made of lower-case letters, digits and dashes, or is taken.
    """
    name, _, folder = text.partition("=")
    path = Path(folder).resolve() if folder else None
    place = "site_file" if folder.endswith((".yaml", ".yml")) else "data_root"
    try:
        return SiteSettings.model_validate({"name": name, place: path})
    except ValidationError as error:
        raise ConfigError(
            f"--site {text}: {error.errors()[0]['msg']}. Give NAME, NAME=DATA_FOLDER or NAME=SITE_FILE, for "
            "example site-a=a/site.yaml."
        ) from None


def parse_study(text: str) -> tuple[str, Path]:
    """Read ``DEPLOYMENT=FILE``.

    Raises:
        ConfigError: it has another form, or there is no such file.
    """
    name, _, file = text.partition("=")
    path = Path(file).resolve()
    if not name or not path.is_file():
        raise ConfigError(f"--study {text}: give DEPLOYMENT=FILE, for example nightly=nightly.yaml; no such file.")
    return name, path


def postgres_url(given: str | None) -> str | None:
    """Return the PostgreSQL server's URL, from the option or from ``FEDMENTOR_POSTGRES_URL``.

    Raises:
        ConfigError: it is no PostgreSQL URL. The message does not repeat it: it may hold a password.
    """
    url = given or os.environ.get(POSTGRES_VARIABLE)
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ConfigError("the PostgreSQL URL must look like postgresql://USER:PASSWORD@HOST:PORT/postgres.")
    return urlunsplit(parts._replace(scheme="postgresql"))


def postgres_database(url: str, driver: Literal["asyncpg", "psycopg2"], name: str) -> str:
    """Return ``url`` for one database and one driver; ``sslmode`` takes the name that the driver knows."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query)
    if driver == "asyncpg":
        query = [("ssl" if key == "sslmode" else key, value) for key, value in query]
    return urlunsplit(parts._replace(scheme=f"postgresql+{driver}", path=f"/{name}", query=urlencode(query)))
