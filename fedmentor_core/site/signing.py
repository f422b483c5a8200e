"""Ed25519 signatures on a site's answers (RFC 8032): the server believes a key, not a place in a store."""

import hashlib
import hmac
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedmentor_core.errors import AnswerRejectedError, ConfigError, OutputExistsError
from fedmentor_core.hashing import canonical_json
from fedmentor_core.secret_file import read_secret_file
from fedmentor_core.site.requests import Answer, SignedAnswer

_CONTEXT = b"fedmentor site answer 1\0"
_ENTRY_CONTEXT = b"fedmentor ledger entry 1\0"
_HOW = "Make one with: fedmentor site keygen --out FILE"


def make_key_file(path: Path) -> str:
    """Write a new private key, readable by its owner only; returns the public key in hex digits.

    Raises:
        OutputExistsError: the file exists; a key is never replaced.
        ConfigError: it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as handle:
            handle.write(secret.hex() + "\n")
    except FileExistsError:
        raise OutputExistsError(f"{path} exists; a key is never replaced. Give another --out.") from None
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be written: {error.strerror}.") from None
    return public_key_of(key)


def read_key_file(path: Path) -> Ed25519PrivateKey:
    """A site's private key.

    Raises:
        ConfigError: the file is missing, open to others, or holds something else. Never quotes it.
    """
    text = read_secret_file(path, "signing key", _HOW)
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text.strip()))
    except ValueError:
        raise ConfigError(f"signing key {path} must hold 64 hex digits. {_HOW}") from None


def public_key_of(key: Ed25519PrivateKey) -> str:
    """The public key in hex digits, as a study's configuration names it."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sign(answer: Answer, key: Ed25519PrivateKey) -> SignedAnswer:
    """``answer`` with a signature over its canonical JSON."""
    return SignedAnswer(answer=answer, signature=key.sign(_signed_bytes(answer)).hex())


def verified(signed: SignedAnswer, public_key: str) -> Answer:
    """The answer, when the holder of the site's private key signed exactly this.

    Raises:
        AnswerRejectedError: another key signed it, nobody did, or it was changed.
    """
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    try:
        key.verify(bytes.fromhex(signed.signature), _signed_bytes(signed.answer))
    except (InvalidSignature, ValueError):  # ValueError: NaN has no canonical JSON, so nobody signed it
        raise AnswerRejectedError(
            f"answer of site {signed.answer.site!r} rejected: its signature is not by the key that the study names. "
            "It was changed, or the site signs with another key (sites.NAME.public_key)."
        ) from None
    return signed.answer


def told_entry(key: Ed25519PrivateKey, sha256: str) -> str:
    """What the server is told in the place of a ledger entry's digest: HMAC-SHA256 under the site's private key.

    An entry may hold a number about private data, such as how many posts two accounts share, between fields that can
    be guessed; its plain digest would let anybody try the numbers out. The site can always show which entry it meant.
    """
    secret = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return hmac.new(secret, _ENTRY_CONTEXT + sha256.encode("ascii"), hashlib.sha256).hexdigest()


def _signed_bytes(answer: Answer) -> bytes:
    return _CONTEXT + canonical_json(answer.model_dump(mode="json", by_alias=True))
