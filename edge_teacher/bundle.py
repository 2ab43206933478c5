"""The signed archive a teacher or a student travels in.

A tar with `card.json`, the files it describes, and `SIGNATURE`: JSON with the SHA-256 of every other
member, the id of the signing key, and an Ed25519 signature over exactly those digests. The same input
gives the same bytes. Nothing is ever extracted by name: members are read into memory, checked, and
written where the reader decides.
"""

from __future__ import annotations

import base64
import hashlib
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.contract.messages import TeacherInfo
from edge_teacher.files import write_atomically
from edge_teacher.keys import key_id

CARD = "card.json"
SIGNATURE = "SIGNATURE"
MAX_MEMBERS = 32
MAX_BYTES = 1 << 30


class TeacherCard(msgspec.Struct, frozen=True, kw_only=True, tag="teacher", tag_field="kind"):
    """`card.json` of a teacher. What it tells of the network is all that ever leaves its owner."""

    teacher: TeacherInfo
    graph: str = "teacher.onnx"
    half: str = ""
    """The graph in half precision, for GPUs: casts inside, the same uint8 input and float32 outputs. Empty
    where there is none; a device from before this field leaves it alone."""
    probe: str = ""
    """uint8[N, H, W, 3] as .npy that runtimes are compared on, if the owner gives some away."""
    format: Literal[1] = 1


class StudentCard(msgspec.Struct, frozen=True, kw_only=True, tag="student", tag_field="kind"):
    """`card.json` of a student."""

    task: str
    version: int
    classes: tuple[str, ...]
    input_size: tuple[int, int]
    graphs: dict[str, str]
    """Runtime dialect (`int8_cpu`, `int8_tensorrt`, `fp32`) to file name."""
    canary_images: str = "canary.images.npy"
    canary_logits: dict[str, str]
    """Dialect to the file with the logits its graph gave at export for the canary images."""
    canary_agreement: float = 0.99
    """Least share of the decisions on the canary images that must be as at export."""
    task_kind: str = "single-label"
    """What kind of task it answers, for people and programs; a device needs only how to read the logits."""
    decision: str = "top-1"
    """How an answer is read off the logits [N, classes, …] (`contract.decisions`). A device from before
    this field takes it for top-1, and refuses a dense student: its logits have more than two dimensions."""
    format: Literal[1] = 1


Card = TeacherCard | StudentCard


class _Signature(msgspec.Struct, frozen=True):
    digests: dict[str, str]
    key: str
    signature: str
    algorithm: Literal["Ed25519"] = "Ed25519"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose signature and digests have been verified."""

    card: Card
    files: Mapping[str, bytes]
    digest: str
    """SHA-256 of the whole archive, hexadecimal."""
    signed_by: str

    def file(self, name: str) -> bytes:
        """Raises CheckFailed if the card names a file that is not there."""
        if name not in self.files:
            raise CheckFailed(f"the bundle has no {name!r}, which its card names; export it again")
        return self.files[name]


def _signed_bytes(digests: Mapping[str, str]) -> bytes:
    return b"fedsa bundle 1\n" + msgspec.json.encode(dict(sorted(digests.items())))


def pack(card: Card, files: Mapping[str, bytes], key: Ed25519PrivateKey) -> bytes:
    """The archive: members sorted by name, no times, no owners. Raises ValueError for a path as a name."""
    members = {CARD: msgspec.json.format(msgspec.json.encode(card), indent=1), **files}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(members.items())}
    proof = key.sign(_signed_bytes(digests))
    members[SIGNATURE] = _encoded(digests, key_id(key.public_key()), proof)
    return _archive(members)


def _encoded(digests: Mapping[str, str], key: str, proof: bytes) -> bytes:
    """SIGNATURE, in the only way it may be written."""
    signature = _Signature(dict(sorted(digests.items())), key, base64.b64encode(proof).decode())
    return msgspec.json.encode(signature)


def write(path: Path, card: Card, files: Mapping[str, bytes], key: Ed25519PrivateKey) -> Bundle:
    """Pack, write atomically, and read back what was written."""
    write_atomically(path, pack(card, files, key))
    return read(path, [key.public_key()])


def read(path: Path, trusted: list[Ed25519PublicKey]) -> Bundle:
    """The verified bundle in a file. Raises UsageError if it is missing, else as `unpack`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the bundle {path} cannot be read: {error.strerror}") from error
    return unpack(data, trusted, name=str(path))


def unpack(data: bytes, trusted: list[Ed25519PublicKey], *, name: str = "the bundle") -> Bundle:
    """Verify first, then look inside.

    Raises CheckFailed if `data` is no bundle, is damaged, or is not signed by one of `trusted`.
    """
    members = _members(data, name)
    if SIGNATURE not in members or CARD not in members:
        raise CheckFailed(f"{name} is no fedsa bundle: it has no {SIGNATURE} or no {CARD}")
    try:
        written = members.pop(SIGNATURE)
        signature = msgspec.json.decode(written, type=_Signature)
        proof = base64.b64decode(signature.signature, validate=True)
    except (ValueError, RecursionError) as error:
        raise CheckFailed(f"the {SIGNATURE} of {name} cannot be read: {error}") from error
    # Base64 has bits that decode to nothing: what is not written as `pack` writes it has been changed.
    if written != _encoded(signature.digests, signature.key, proof):
        raise CheckFailed(f"the {SIGNATURE} of {name} is damaged: copy it again")
    key = next((k for k in trusted if key_id(k) == signature.key), None)
    if key is None:
        known = ", ".join(key_id(k) for k in trusted) or "none"
        raise CheckFailed(
            f"{name} is signed by the key {signature.key}, which is not trusted here "
            f"(trusted: {known})"
        )
    try:
        key.verify(proof, _signed_bytes(signature.digests))
    except InvalidSignature as error:
        raise CheckFailed(f"the signature of {name} is wrong: do not use it") from error
    if set(members) != set(signature.digests):
        raise CheckFailed(f"the files of {name} are not those that were signed")
    for member, content in members.items():
        if hashlib.sha256(content).hexdigest() != signature.digests[member]:
            raise CheckFailed(f"{member} in {name} is not the file that was signed")
    try:
        card = msgspec.json.decode(members.pop(CARD), type=Card)
    except (ValueError, RecursionError) as error:
        raise CheckFailed(f"the {CARD} of {name} cannot be used: {error}") from error
    return Bundle(card, members, hashlib.sha256(data).hexdigest(), signature.key)


def _header(name: str, size: int) -> bytes:
    """The one header a member may have: no time, no owner, a regular file. ValueError for a path."""
    if {"/", "\\", "\0"} & set(name) or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no name for a file in a bundle")
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def _padding(size: int, block: int) -> bytes:
    return bytes(-size % block)


def _archive(members: Mapping[str, bytes]) -> bytes:
    parts = []
    for name, content in sorted(members.items()):
        padding = _padding(len(content), tarfile.BLOCKSIZE)
        parts += [_header(name, len(content)), content, padding]
    parts.append(bytes(2 * tarfile.BLOCKSIZE))
    parts.append(_padding(sum(map(len, parts)), tarfile.RECORDSIZE))
    return b"".join(parts)


def _members(data: bytes, name: str) -> dict[str, bytes]:
    """What `_archive` would make `data` of. A tar with any other byte anywhere is refused.

    The digests do not cover headers and padding; that there is only one way to write them does.
    """
    members: dict[str, bytes] = {}
    start, last = 0, ""
    while any(header := data[start : start + tarfile.BLOCKSIZE]):
        member, size = _described(header, name)
        start += tarfile.BLOCKSIZE
        if member <= last or len(members) >= MAX_MEMBERS or start + size > MAX_BYTES:
            raise CheckFailed(f"{name} holds {member!r}, which no bundle may")
        end = start + size
        start = end + len(_padding(size, tarfile.BLOCKSIZE))
        if start > len(data):
            raise CheckFailed(f"{name} ends in the middle of {member!r}: copy it again")
        if any(data[end:start]):
            raise CheckFailed(f"{name} is damaged behind {member!r}: copy it again")
        members[member] = data[end - size : end]
        last = member
    end = start + 2 * tarfile.BLOCKSIZE
    if data[start:] != bytes(end - start) + _padding(end, tarfile.RECORDSIZE):
        raise CheckFailed(f"{name} is damaged or no bundle at all: it does not end as one")
    return members


def _described(header: bytes, name: str) -> tuple[str, int]:
    """Name and size of a member (POSIX ustar: bytes 0-99 and 124-135)."""
    try:
        member = header[:100].rstrip(b"\0").decode()
        size = int(header[124:135], 8)
        canonical = size >= 0 and header == _header(member, size)
    except ValueError:
        canonical = False
    if not canonical:
        raise CheckFailed(f"{name} is damaged or no bundle at all: no file begins where one should")
    return member, size
