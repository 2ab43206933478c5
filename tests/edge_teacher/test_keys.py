from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from edge_teacher.contract.errors import UsageError
from edge_teacher.keys import key_id, private_key_at, read_private, read_public

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RAW = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def public_pem(key: object) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]


def private_pem(key: object, password: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)  # type: ignore[attr-defined, no-any-return]


def test_the_id_is_the_documented_digest() -> None:
    assert key_id(KEY.public_key()) == hashlib.sha256(RAW).hexdigest()[:16]


def test_a_new_key_is_its_owner_s_alone_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "owner.key"
    key = private_key_at(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key_id(read_public(path.with_suffix(".pub"))) == key_id(key.public_key())
    assert private_key_at(path).private_bytes_raw() == key.private_bytes_raw()


def test_a_missing_public_half_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    key = private_key_at(path)
    path.with_suffix(".pub").unlink()  # as after an interruption between the two
    private_key_at(path)
    assert key_id(read_public(path.with_suffix(".pub"))) == key_id(key.public_key())


def test_a_private_key_never_stands_under_a_public_one_s_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a name for a public key"):
        private_key_at(tmp_path / "owner.pub")
    assert list(tmp_path.iterdir()) == []


def test_two_keys_do_not_share_a_public_half(tmp_path: Path) -> None:
    first = private_key_at(tmp_path / "a.key")
    with pytest.raises(UsageError, match=r"a\.pub is the public half of another key"):
        private_key_at(tmp_path / "a.pem")
    assert not (tmp_path / "a.pem").exists()
    (tmp_path / "a.pem").write_bytes(private_pem(KEY))
    with pytest.raises(UsageError, match=r"a\.pub is not the public half of .*a\.pem"):
        private_key_at(tmp_path / "a.pem")
    assert key_id(read_public(tmp_path / "a.pub")) == key_id(first.public_key())


WRONG = {
    "missing": None,
    "empty": b"",
    "garbage": b"\xff\xfe" * 40,
    "truncated": private_pem(KEY)[:60],
    "x25519": private_pem(x25519.X25519PrivateKey.generate()),
    "x25519 public": public_pem(x25519.X25519PrivateKey.generate()),
    "ec": private_pem(ec.generate_private_key(ec.SECP256R1())),
    "ec public": public_pem(ec.generate_private_key(ec.SECP256R1())),
    "unknown algorithm": b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VjAyEA"
    + b"A" * 43
    + b"=\n-----END PUBLIC KEY-----\n",
}


@pytest.mark.parametrize("read", [read_private, read_public])
def test_anything_but_an_ed25519_key_is_a_usage_error_that_names_the_file(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    other = {"private": private_pem(KEY)} if read is read_public else {"public": public_pem(KEY)}
    wrong = {**WRONG, **other, "encrypted": private_pem(KEY, b"x")}
    for name, content in wrong.items():
        path = tmp_path / f"{name}.pem"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            read(path)
        assert str(path) in str(caught.value), name
    with pytest.raises(UsageError):
        read(tmp_path)  # a folder
