"""A study's Prefect database is a copy of one that Prefect itself brought up to date; where there is none, nothing is lost."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest

from flows import prefect_database
from flows.prefect_database import provide_database, put_database


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("FEDMENTOR_CACHE_DIR", str(cache))
    for name in prefect_database._OTHER_DATABASE:
        monkeypatch.delenv(name, raising=False)


def tables(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def test_it_is_what_prefect_itself_makes_and_prefect_changes_nothing_in_it(tmp_path: Path, cache: Path) -> None:
    assert put_database(tmp_path / "home")
    made = tmp_path / "home" / "prefect.db"
    before = tables(made)
    assert "flow_run" in before
    with closing(sqlite3.connect(made)) as connection:
        filled = {
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            if connection.execute(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0]
        }
    assert filled == {"alembic_version"}, "empty of everything but Prefect's mark: no key, no id, no run"
    upgraded = subprocess.run(
        [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"],
        env=os.environ | {"PREFECT_HOME": str(made.parent)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert upgraded.returncode == 0, upgraded.stderr
    assert tables(made) == before
    assert [one.name for one in cache.iterdir()] == [f"prefect-{version('prefect')}.db"], "nothing else stays"


def test_another_database_of_the_user_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``put_database``, as ``fedmentor up`` calls it, goes by the folder alone, whatever Prefect's settings name."""
    theirs, folder = tmp_path / "theirs.db", tmp_path / "project"
    folder.mkdir()
    url = f"sqlite+aiosqlite:///{theirs}"
    (folder / "prefect.toml").write_text(f'[server.database]\nconnection_url = "{url}"\n')
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url)
    monkeypatch.setenv("FEDMENTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert put_database(tmp_path / "home")
    assert not theirs.exists()


def test_the_second_time_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert put_database(tmp_path / "first")
    monkeypatch.setattr(prefect_database, "_make", lambda _: pytest.fail("made again"))
    assert put_database(tmp_path / "second")
    assert tables(tmp_path / "second" / "prefect.db") == tables(tmp_path / "first" / "prefect.db")


def test_a_database_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "prefect.db").write_bytes(b"the user's")
    assert not put_database(tmp_path)
    assert (tmp_path / "prefect.db").read_bytes() == b"the user's"


@pytest.mark.parametrize("name", prefect_database._OTHER_DATABASE)
def test_a_server_or_database_of_the_user_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv(name, "http://elsewhere.example/api")
    assert not provide_database()
    assert not any(tmp_path.iterdir())


def test_without_a_home_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    assert not provide_database()


def test_the_environment_s_home_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    assert provide_database()
    assert "flow_run" in tables(tmp_path / "home" / "prefect.db")


@pytest.mark.parametrize("damage", [b"", b"not a database", None], ids=["empty", "not a database", "cut short"])
def test_a_damaged_one_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None) -> None:
    assert put_database(tmp_path / "first")
    whole = (tmp_path / "first" / "prefect.db").read_bytes()
    monkeypatch.setenv("FEDMENTOR_CACHE_DIR", str(tmp_path))
    kept = tmp_path / f"prefect-{version('prefect')}.db"
    kept.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    monkeypatch.setattr(prefect_database, "_make", lambda template: template.write_bytes(whole))
    assert put_database(tmp_path / "second")
    assert (tmp_path / "second" / "prefect.db").read_bytes() == whole


def test_one_that_others_may_write_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert put_database(tmp_path / "first")
    kept = next(cache.iterdir())
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.chmod(0o666)
    made: list[Path] = []
    monkeypatch.setattr(prefect_database, "_make", made.append)
    put_database(tmp_path / "second")
    assert made == [kept]
    kept.chmod(0o600)


@pytest.mark.parametrize("problem", ["it fails", "no place to keep it"])
def test_where_it_cannot_be_made_prefect_is_left_to_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDMENTOR_CACHE_DIR", str(cache))
    if problem == "it fails":
        monkeypatch.setattr(sys, "executable", "/bin/false")
    else:
        cache.write_text("a file")
    assert not put_database(tmp_path / "home")
    assert not (tmp_path / "home").exists()
    assert problem != "it fails" or not any(cache.iterdir())


def test_one_that_came_meanwhile_is_not_overwritten(tmp_path: Path, cache: Path) -> None:
    assert put_database(tmp_path / "first")
    (tmp_path / "prefect.db").write_bytes(b"of another process")
    assert not prefect_database._put(next(cache.iterdir()), tmp_path / "prefect.db")
    assert (tmp_path / "prefect.db").read_bytes() == b"of another process"
    assert [one.name for one in tmp_path.glob("prefect.db*")] == ["prefect.db"]
