"""Ed25519 keys: owners sign teachers, coordinators sign students, devices know whom to trust."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from edge_teacher.contract.errors import UsageError
from edge_teacher.files import write_atomically


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def read_private(path: Path) -> Ed25519PrivateKey:
    """Raises UsageError for anything but a PEM file with an unencrypted Ed25519 private key."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is no readable private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} holds a key that is not Ed25519")
    return key


def read_public(path: Path) -> Ed25519PublicKey:
    """Raises UsageError for anything but a PEM file with an Ed25519 public key."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is no readable public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} holds a key that is not Ed25519")
    return key


def public_path(private: Path) -> Path:
    """Where the public half of a key stands."""
    return private.with_suffix(".pub")


def private_key_at(path: Path) -> Ed25519PrivateKey:
    """The key there; a new one, readable by its owner only, if there is none. `.pub` stands beside it.

    Raises UsageError for a name that is a public key's, or where another key's public half stands.
    """
    public_file = public_path(path)
    if path == public_file:
        raise UsageError(f"{path} is a name for a public key; name the private one {path.stem}.key")
    if not path.exists():
        if public_file.exists():
            raise UsageError(
                f"{public_file} is the public half of another key, and a new key at {path} would need "
                "its place: choose another name"
            )
        pem = Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        write_atomically(path, pem, mode=0o600)
    key = read_private(path)
    if not public_file.exists():
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        write_atomically(public_file, public)
    elif key_id(read_public(public_file)) != key_id(key.public_key()):
        raise UsageError(
            f"{public_file} is not the public half of {path}: remove it, or name the key it belongs to"
        )
    return key
