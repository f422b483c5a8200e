"""A study by reference, and the output folder that belongs to it."""

import json
import secrets
from pathlib import Path
from typing import Any

from fedmentor_core import __version__
from fedmentor_core.config import StorageConfig, StudyConfig
from fedmentor_core.config_io import config_sha256
from fedmentor_core.errors import ConfigError, OutputExistsError
from fedmentor_core.records import Record

MARKER = "study.json"


class StudyRef(Record):
    """A study by reference: its configuration, its id and where its outputs go."""

    config: StudyConfig
    run_id: str
    out_dir: str

    @property
    def store_url(self) -> str:
        """The artifact store's URL."""
        return self.config.storage.url or (Path(self.out_dir).resolve() / "store").as_uri()

    @property
    def config_sha256(self) -> str:
        """Digest of what the study computes."""
        return config_sha256(self.config)


def find_study(config: StudyConfig, out_dir: str | Path, default_store: str | None = None) -> StudyRef:
    """The study that ``out_dir`` holds, or a new one for it. Writes nothing.

    Where the configuration names no store, a new study's is ``default_store``, and without that in ``out_dir``; a study
    that is there keeps the one it started with.

    Raises:
        ConfigError: ``default_store`` is no store's URL.
        OutputExistsError: the folder already holds another study.
    """
    out = Path(out_dir).resolve()
    digest = config_sha256(config)
    found = _read_marker(out)
    if config.storage.url is None:
        config = _with_store(config, default_store if found is None else found.get("store_url"))
    if found is not None:
        if found.get("config_sha256") != digest:
            raise OutputExistsError(
                f"output folder {out_dir} already holds study {found.get('study')!r} with another configuration "
                f"(sha256 {str(found.get('config_sha256'))[:12]}, this one has {digest[:12]}). Nothing was changed. "
                "Give another --out, or the same configuration to resume."
            )
        return StudyRef(config=config, run_id=found["run_id"], out_dir=str(out))
    if (out / "summary.json").exists() or (out.exists() and not out.is_dir()):
        raise OutputExistsError(
            f"output folder {out_dir} holds something that is not a study of ours. Nothing was changed. "
            "Give another --out."
        )
    return StudyRef(config=config, run_id=f"{config.name}-{secrets.token_hex(4)}", out_dir=str(out))


def claim_study(ref: StudyRef) -> None:
    """Write the output folder's marker, so that the same command resumes this study.

    Raises:
        OutputExistsError: another study was faster.
    """
    out = Path(ref.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "study": ref.config.name,
        "run_id": ref.run_id,
        "config_sha256": ref.config_sha256,
        "store_url": ref.config.storage.url,
        "ledger_url": ref.config.privacy.ledger_url,
        "fedmentor": __version__,
    }
    try:
        with (out / MARKER).open("x", encoding="utf-8") as handle:
            handle.write(json.dumps(facts, indent=2) + "\n")
    except FileExistsError:
        if find_study(ref.config, out).run_id != ref.run_id:
            raise OutputExistsError(
                f"output folder {out} was taken by another start of this study a moment ago. Start again to join it."
            ) from None


def open_study(config: StudyConfig, out_dir: str | Path, default_store: str | None = None) -> StudyRef:
    """``find_study`` and ``claim_study``: create the study in ``out_dir``, or find it there to resume."""
    ref = find_study(config, out_dir, default_store)
    claim_study(ref)
    return ref


def ledgers_url(out_dir: str | Path) -> str:
    """Store URL of the ledgers that a study's output folder charged.

    Raises:
        ConfigError: the folder holds no study.
    """
    out = Path(out_dir).resolve()
    found = _read_marker(out)
    if found is None:
        raise ConfigError(f"{out_dir} holds no study. Give a study's output folder, or --store URL.")
    return str(found.get("ledger_url") or found.get("store_url") or (out / "store").as_uri())


def _read_marker(out: Path) -> dict[str, Any] | None:
    marker = out / MARKER
    if not marker.is_file():
        return None
    found: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    return found


def _with_store(config: StudyConfig, url: str | None) -> StudyConfig:
    if not url:
        return config
    try:
        storage = StorageConfig.model_validate({**config.storage.model_dump(), "url": url})
    except ValueError:
        raise ConfigError(f"a study's store must be file:///path or s3://bucket/prefix, got {url!r}.") from None
    return config.model_copy(update={"storage": storage})
