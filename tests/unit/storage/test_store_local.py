"""The directory store when things go wrong: kills, full disks, missing rights, several processes."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmentor_core.errors import AlreadyExistsError, StorageError
from fedmentor_core.storage.base import open_store
from fedmentor_core.storage.local import LocalStore


def test_kill_in_the_middle_of_a_write_leaves_nothing_visible(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from fedmentor_core.storage.local import LocalStore
real = os.fsync
def stop(descriptor):
    print("written", flush=True)
    sys.stdin.read()
os.fsync = stop
Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
LocalStore(Path(sys.argv[1])).put_bytes("a", b"x" * 10_000_000)
"""
    root = tmp_path / "store"
    (root / ".fedmentor" / "tmp").mkdir(parents=True)
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(list((root / ".fedmentor" / "tmp").iterdir())) == 1, "the torn file is there"
    store = LocalStore(root)
    assert list(store.list_keys("")) == []
    assert not store.exists("a")
    store.put_bytes("a", b"whole")
    assert store.get_bytes("a") == b"whole"


def test_torn_files_of_dead_writers_are_removed_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / ".fedmentor" / "tmp"
    folder.mkdir(parents=True)
    for name, age in (("old", 2 * 86400), ("young", 3600)):
        (folder / name).write_bytes(b"torn")
        os.utime(folder / name, (time.time() - age,) * 2)
    LocalStore(tmp_path).put_bytes("a", b"x")
    assert [path.name for path in folder.iterdir()] == ["young"]


def test_of_several_processes_exactly_one_creates(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from fedmentor_core.errors import AlreadyExistsError
from fedmentor_core.storage.local import LocalStore
store = LocalStore(Path(sys.argv[1]))
sys.stdin.readline()
won = []
for i in range(50):
    try:
        store.put_bytes(f"race/{i}", sys.argv[2].encode() * 1000)
        won.append(i)
    except AlreadyExistsError:
        pass
print(*won)
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    won = [set(map(int, child.communicate()[0].split())) for child in children]
    assert won[0] | won[1] == set(range(50))
    assert not won[0] & won[1]
    store = LocalStore(tmp_path)
    for i in range(50):
        assert store.get_bytes(f"race/{i}") == (b"a" if i in won[0] else b"b") * 1000


def test_object_is_on_the_disk_before_its_name_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_link = os.fsync, os.link

    def fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append(f"sync {kind}")
        real_fsync(descriptor)

    def link(source: str, target: Path) -> None:
        events.append("link")
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    LocalStore(tmp_path).put_bytes("x/y", b"data")
    at = events.index("link")
    assert "sync file" in events[:at]
    assert events[at + 1 :] == ["sync folder"]
    assert events[:at].count("sync folder") == 3, "new folders x, .fedmentor and .fedmentor/tmp too"


@pytest.mark.parametrize("broken", ["fsync", "link"])
def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    store = LocalStore(tmp_path)
    store.put_bytes("first", b"")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        with pytest.raises(StorageError, match=r"cannot write a/b .*No space left.*Check"):
            store.put_bytes("a/b", b"data")
    assert list(store.list_keys("")) == ["first"]
    assert list((tmp_path / ".fedmentor" / "tmp").iterdir()) == []
    store.put_bytes("a/b", b"data")


def test_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=r"no hard links.*ext4"):
        LocalStore(tmp_path).put_bytes("a", b"")


def test_store_of_plain_files_is_read(tmp_path: Path) -> None:
    """A folder that was copied with no extended attributes is the same store."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.json").write_bytes(b'{"x":1}')
    store = open_store(tmp_path.as_uri())
    assert store.get_json("a/b.json") == {"x": 1}
    assert store.put("a/b.json", b'{"x":1}').n_bytes == 7
    with pytest.raises(AlreadyExistsError):
        store.put("a/b.json", b'{"x":2}')
    assert list(store.list_keys("")) == ["a/b.json"]


def test_folder_that_cannot_be_read_is_not_left_out_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.put_bytes("a/b", b"")
    store.put_bytes("c/d", b"")
    real = os.scandir

    def refuse(folder: str) -> object:
        if str(folder).endswith("/c"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match=r"cannot list all .*Permission denied"):
        list(store.list_keys(""))
    assert list(store.list_keys("a")) == ["a/b"]
