"""Envelope encryption: what a store's holder sees, and what they can do without being noticed."""

import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import AlreadyExistsError, ConfigError, IntegrityError, StorageError
from fedmentor_core.storage import envelope
from fedmentor_core.storage.base import ArtifactStore, open_store
from fedmentor_core.storage.body import Body
from fedmentor_core.storage.encrypted import EncryptedStore, KeyRing
from fedmentor_core.storage.envelope import HEADER_BYTES, SEGMENT_BYTES, Key, opened_bytes, seal, sealed_bytes, unseal
from fedmentor_core.storage.local import LocalStore

KEY, OTHER = Key(b"k" * 32), Key(b"o" * 32)
SIZES = [0, 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES, 3 * SEGMENT_BYTES + 5]


def sealed(data: bytes, name: str = "a/b", key: Key = KEY) -> bytes:
    return b"".join(seal(name, Body.of(data), key))


def opened(data: bytes, name: str = "a/b", *keys: Key) -> bytes:
    return b"".join(unseal(name, iter([data]), {key.id: key for key in keys or (KEY,)}).segments)


@pytest.mark.parametrize("n_bytes", SIZES)
def test_envelope_opens_to_what_was_sealed(n_bytes: int) -> None:
    data = random.Random(n_bytes).randbytes(n_bytes)
    made = sealed(data)
    assert len(made) == sealed_bytes(n_bytes)
    assert opened_bytes(len(made)) == n_bytes
    assert opened(made) == data
    cut = [made[i : i + 700_001] for i in range(0, len(made), 700_001)]
    assert b"".join(unseal("a/b", iter(cut), {KEY.id: KEY}).segments) == data
    assert sealed(data) != made, "another data key each time"


@given(st.integers(0, 5 * SEGMENT_BYTES))
def test_sizes_are_one_to_one(n: int) -> None:
    assert opened_bytes(sealed_bytes(n)) == n
    found = opened_bytes(n)
    assert found is None or sealed_bytes(found) == n


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_bit_is_noticed(data: st.DataObject) -> None:
    made = bytearray(sealed(b"some private weights" * 3))
    place = data.draw(st.integers(0, len(made) - 1))
    made[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StorageError):
        opened(bytes(made))


def test_cut_reordered_and_repeated_segments_are_noticed() -> None:
    made = sealed(random.Random(0).randbytes(3 * SEGMENT_BYTES))
    size = SEGMENT_BYTES + 16
    head, parts = made[:HEADER_BYTES], [made[HEADER_BYTES + i * size : HEADER_BYTES + (i + 1) * size] for i in range(3)]
    for order in ([0, 1], [0, 2], [1, 0, 2], [0, 0, 2], [0, 1, 2, 2], []):
        with pytest.raises(IntegrityError):
            opened(head + b"".join(parts[i] for i in order))
    with pytest.raises(IntegrityError):
        opened(made[: HEADER_BYTES - 1])


def test_objects_and_headers_cannot_be_exchanged() -> None:
    one, two = sealed(b"one", "x/1"), sealed(b"two", "x/2")
    with pytest.raises(IntegrityError, match="copied from another key"):
        opened(one, "x/2")
    with pytest.raises(IntegrityError):
        opened(one[:HEADER_BYTES] + two[HEADER_BYTES:], "x/1")
    with pytest.raises(IntegrityError, match="not encrypted"):
        opened(b"FMENC\x02" + one[6:], "x/1")


def test_known_answer_of_the_format() -> None:
    # Written down once, byte by byte, so that later versions still read it.
    head = b"FMENC\x01" + KEY.id
    data_key, nonce, plain = b"d" * 32, b"n" * 12, b"hello"
    inside = data_key + bytes.fromhex(Body.of(plain).sha256) + (5).to_bytes(8, "big")
    header = head + nonce + AESGCM(KEY.secret).encrypt(nonce, inside, head + b"a/b")
    body = AESGCM(data_key).encrypt(bytes(11) + b"\x01", plain, header + b"a/b")
    assert opened(header + body) == plain


def test_keys_rotate(tmp_path: Path) -> None:
    inner = LocalStore(tmp_path / "store")
    old = EncryptedStore(inner, KeyRing([OTHER]))
    old_ref, pointer = old.put("old", b"1"), old.swap_pointer("head", b"p", None)
    both = EncryptedStore(inner, KeyRing([KEY, OTHER]))
    assert both.get(old_ref) == b"1"
    assert both.read_pointer("head") == pointer
    new_ref = both.put("new", b"2")
    both.swap_pointer("head", b"q", pointer)
    new = EncryptedStore(inner, KeyRing([KEY]))
    assert new.get(new_ref) == b"2"
    with pytest.raises(StorageError, match=f"key {OTHER.id.hex()}.*{KEY.id.hex()}.*Add that key") as caught:
        new.get(old_ref)
    assert not isinstance(caught.value, IntegrityError)


def test_store_shows_no_plaintext_nor_its_digest(tmp_path: Path, key_file: Path) -> None:
    store = open_store((tmp_path / "s").as_uri(), StorageConfig(encryption_key_file=str(key_file)))
    ref = store.put("a", b"private" * 9)
    store.swap_pointer("head", b"private", None)
    (tmp_path / "file").write_bytes(b"private" * 300_000)
    store.put_file("f", tmp_path / "file")
    for path in (tmp_path / "s").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"private" not in content
            assert ref.sha256.encode() not in content
            assert bytes.fromhex(ref.sha256) not in content


def test_unencrypted_object_is_refused_not_read(tmp_path: Path) -> None:
    inner = LocalStore(tmp_path)
    inner.put("a", b"x" * 500)
    store: ArtifactStore = EncryptedStore(inner, KeyRing([KEY]))
    with pytest.raises(IntegrityError, match="not encrypted"):
        store.get_bytes("a")
    with pytest.raises((IntegrityError, AlreadyExistsError)):
        store.put("a", b"x" * 500)
    inner.put("short", b"x")
    with pytest.raises(IntegrityError, match="no encrypted object"):
        store.stat("short")


def test_pointer_and_object_of_one_name_do_not_open_as_each_other(tmp_path: Path) -> None:
    inner = LocalStore(tmp_path)
    store = EncryptedStore(inner, KeyRing([KEY]))
    store.put("head", b"object")
    inner._swap_pointer("head", inner.get_bytes("head"), None)
    with pytest.raises(IntegrityError):
        store.read_pointer("head")


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "holds no key"), ("# only words\n", "holds no key"), ("zz" * 32, "line 1"), ("#\n\n" + "ab" * 31, "line 3")],
)
def test_bad_key_file_is_said_without_quoting_it(key_file: Path, text: str, why: str) -> None:
    key_file.write_text(text)
    with pytest.raises(ConfigError, match=f"{why}.*Make one with") as caught:
        KeyRing.from_file(key_file)
    assert "zzzz" not in str(caught.value)
    assert "abab" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_key_file_that_others_can_use_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode 0{mode:o}.*chmod 600"):
        KeyRing.from_file(key_file)


def test_absent_key_file_is_said_when_the_store_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        open_store(tmp_path.as_uri(), StorageConfig(encryption_key_file=str(tmp_path / "absent")))


def test_key_is_never_shown() -> None:
    assert "kkkk" not in repr(KEY)
    assert KEY.secret.hex() not in f"{KEY} {KeyRing([KEY]).by_id}"
    assert envelope.Key(b"k" * 32).id == KEY.id
