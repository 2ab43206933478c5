from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_teacher import bundle as bundles
from edge_teacher.bundle import (
    CARD,
    MAX_MEMBERS,
    SIGNATURE,
    Card,
    StudentCard,
    TeacherCard,
    pack,
    read,
    unpack,
    write,
)
from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.contract.messages import TapInfo, TeacherInfo
from edge_teacher.keys import key_id

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
TRUSTED = [KEY.public_key()]
STUDENT = StudentCard(
    task="animals",
    version=3,
    classes=("cat", "dog"),
    input_size=(32, 32),
    graphs={"fp32": "student.onnx"},
    canary_logits={"fp32": "canary.fp32.npy"},
)
TEACHER = TeacherCard(
    teacher=TeacherInfo(
        name="t",
        version=1,
        input_size=(32, 32),
        taps={"last": TapInfo(channels=3, height=4, width=4)},
        saliency_tap="last",
        saliency_size=(4, 4),
        saliency_kind="grad-cam",
    )
)
FILES = {"student.onnx": b"graph" * 9, "empty": b"", "canary.fp32.npy": bytes(range(256)) * 5}
GOOD = pack(STUDENT, FILES, KEY)

Member = tuple[tarfile.TarInfo, bytes]


def members(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info, (tar.extractfile(info) or io.BytesIO()).read()) for info in tar]


def archive(found: list[Member]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in found:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.mode, info.type, info.linkname = 0o644, kind, link
    return info, content


def signed(contents: dict[str, bytes], key: Ed25519PrivateKey = KEY) -> bytes:
    """Anything at all, properly signed: what a trusted key may do wrong. By the documentation."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())}
    proof = key.sign(b"fedsa bundle 1\n" + msgspec.json.encode(digests))
    signature = {
        "digests": digests,
        "key": key_id(key.public_key()),
        "signature": base64.b64encode(proof).decode(),
        "algorithm": "Ed25519",
    }
    every = {**contents, SIGNATURE: msgspec.json.encode(signature)}
    return archive([member(name, every[name]) for name in sorted(every)])


@pytest.mark.parametrize("card", [STUDENT, TEACHER])
def test_what_is_packed_is_unpacked(card: Card) -> None:
    data = pack(card, FILES, KEY)
    found = unpack(data, [OTHER.public_key(), *TRUSTED])
    assert found.card == card
    assert found.files == FILES
    assert found.digest == hashlib.sha256(data).hexdigest()
    assert found.signed_by == key_id(KEY.public_key())


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z.]{0,19}", fullmatch=True), st.binary(max_size=600), max_size=5
    )
)
def test_the_same_input_gives_the_same_bytes_in_any_order(files: dict[str, bytes]) -> None:
    once = pack(STUDENT, files, KEY)
    assert pack(STUDENT, dict(reversed(files.items())), KEY) == once
    assert unpack(once, TRUSTED).files == files


def test_nothing_of_this_machine_or_moment_is_in_it() -> None:
    for info, _ in members(GOOD):
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
        assert info.mode == 0o644


def test_the_format_is_the_documented_one() -> None:
    card = {info.name: content for info, content in members(GOOD)}[CARD]
    assert signed({CARD: card, **FILES}) == GOOD


def test_a_file_is_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "s.fedsa"
    assert write(path, STUDENT, FILES, KEY) == read(path, TRUSTED)
    assert path.read_bytes() == GOOD
    with pytest.raises(CheckFailed, match=r"s\.fedsa"):
        read(path, [OTHER.public_key()])


@pytest.mark.parametrize("make", [lambda p: p / "missing", lambda p: p])
def test_a_file_that_cannot_be_read_is_a_usage_error(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(make(tmp_path), TRUSTED)


def refused(data: bytes) -> str:
    with pytest.raises(CheckFailed) as caught:
        unpack(data, TRUSTED, name="x.fedsa")
    assert "x.fedsa" in str(caught.value)
    return str(caught.value)


@settings(max_examples=400, deadline=None)
@given(position=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_noticed(position: int, bit: int) -> None:
    damaged = bytearray(GOOD)
    damaged[position] ^= 1 << bit
    refused(bytes(damaged))


def test_every_flipped_bit_of_the_signature_is_noticed() -> None:
    """All of them: no digest covers this file, and base64 has bits that decode to nothing."""
    begins = GOOD.index(b'{"digests"')
    ends = GOOD.index(b"}", GOOD.index(b'"algorithm"'))
    for position in range(begins, ends + 1):
        for bit in range(8):
            damaged = bytearray(GOOD)
            damaged[position] ^= 1 << bit
            refused(bytes(damaged))


def test_a_flipped_bit_in_every_block_s_padding_is_noticed() -> None:
    for position in range(511, len(GOOD), 512):
        damaged = bytearray(GOOD)
        damaged[position] ^= 1
        refused(bytes(damaged))


def test_every_truncation_is_noticed() -> None:
    for end in [*range(0, len(GOOD), 97), *range(len(GOOD) - 600, len(GOOD))]:
        refused(GOOD[:end])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000))
def test_bytes_from_nowhere_are_no_bundle(data: bytes) -> None:
    refused(data)
    refused(GOOD + (data or b"\0"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_overwritten_stretches_never_do_worse_than_a_sentence(data: st.DataObject) -> None:
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(GOOD) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=150))
        damaged[start : start + len(piece)] = piece
    if bytes(damaged[: len(GOOD)]) != GOOD:
        refused(bytes(damaged[: len(GOOD)]))


@pytest.mark.parametrize("index", range(len(members(GOOD))))
def test_every_missing_member_is_noticed(index: int) -> None:
    found = members(GOOD)
    del found[index]
    refused(archive(found))


@pytest.mark.parametrize(
    "extra",
    [
        member("extra", b"x"),
        member(".hidden", b""),
        member("../escape", b"x"),
        member("/etc/passwd", b"x"),
        member("folder/file", b"x"),
        member("student.onnx", b"a second one"),
        member(CARD, b"{}"),
        member("link", b"", tarfile.SYMTYPE, "/etc/passwd"),
        member("link", b"", tarfile.LNKTYPE, "student.onnx"),
        member("folder", b"", tarfile.DIRTYPE),
        member("device", b"", tarfile.CHRTYPE),
        member("pipe", b"", tarfile.FIFOTYPE),
        member("", b"x"),
    ],
    ids=lambda m: repr(m[0]),
)
@pytest.mark.parametrize("first", [True, False])
def test_every_extra_member_is_noticed(extra: Member, first: bool) -> None:
    found = members(GOOD)
    refused(archive([extra, *found] if first else [*found, extra]))


@pytest.mark.parametrize("name", ["../escape", "/absolute", "a/b", "a\\b", "..", "."])
def test_a_name_that_is_a_path_is_refused_even_when_signed(name: str) -> None:
    card = msgspec.json.encode(STUDENT)
    refused(signed({CARD: card, **FILES, name: b"x"}))
    with pytest.raises(ValueError, match="no name"):
        pack(STUDENT, {name: b"x"}, KEY)


def test_members_in_another_order_are_refused() -> None:
    refused(archive(members(GOOD)[::-1]))


def test_a_name_longer_than_the_format_has_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        pack(STUDENT, {"x" * 101: b""}, KEY)
    info = tarfile.TarInfo("x" * 101)
    refused(info.tobuf(tarfile.GNU_FORMAT) + GOOD)
    refused(info.tobuf(tarfile.PAX_FORMAT) + GOOD)


def test_a_renamed_and_a_swapped_member_are_noticed() -> None:
    found = members(GOOD)
    contents = [content for _, content in found]
    renamed = [member("other" if i.name == "empty" else i.name, c) for i, c in found]
    refused(archive(renamed))
    refused(archive([(info, contents[i - 1]) for i, (info, _) in enumerate(found)]))


def test_too_many_members_are_refused_before_they_are_read() -> None:
    many = {f"f{i}": b"" for i in range(MAX_MEMBERS)}
    assert "which no bundle may" in refused(signed({CARD: msgspec.json.encode(STUDENT), **many}))


def test_too_many_bytes_are_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_BYTES", 1000)
    assert "which no bundle may" in refused(GOOD)


def test_a_size_that_only_the_header_has_takes_no_memory() -> None:
    info, _ = member("student.onnx", b"")
    info.size = 1 << 29
    refused(info.tobuf(tarfile.USTAR_FORMAT) + b"x" * 512)


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0"])
def test_a_negative_or_endless_size_is_refused(size: bytes) -> None:
    header = bytearray(member("a", b"")[0].tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    refused(bytes(header) + GOOD)


class TestSignature:
    def resigned(self, **changes: object) -> bytes:
        found = members(GOOD)
        made = []
        for info, content in found:
            if info.name == SIGNATURE:
                content = msgspec.json.encode({**msgspec.json.decode(content), **changes})
            made.append((info, content))
        return archive(made)

    def test_unchanged_it_is_the_good_one(self) -> None:
        assert self.resigned() == GOOD

    def test_a_key_that_is_not_trusted(self) -> None:
        message = refused(pack(STUDENT, FILES, OTHER))
        assert key_id(OTHER.public_key()) in message
        assert key_id(KEY.public_key()) in message

    def test_no_key_trusted_at_all(self) -> None:
        with pytest.raises(CheckFailed, match="trusted: none"):
            unpack(GOOD, [])

    def test_a_strangers_signature_under_a_trusted_key_s_name(self) -> None:
        forged = members(pack(STUDENT, FILES, OTHER))
        signature = msgspec.json.decode({i.name: c for i, c in forged}[SIGNATURE])
        assert "wrong" in refused(self.resigned(signature=signature["signature"]))

    @pytest.mark.parametrize(
        "changes",
        [
            {"signature": ""},
            {"signature": "AAAA"},
            {"signature": "not base64!"},
            {"signature": 3},
            {"algorithm": "none"},
            {"algorithm": ""},
            {"key": ""},
            {"digests": {}},
            {"digests": []},
            {"digests": {"student.onnx": "00"}},
        ],
    )
    def test_anything_changed_in_it(self, changes: dict[str, object]) -> None:
        refused(self.resigned(**changes))

    @pytest.mark.parametrize(
        "content",
        [b"", b"{}", b"null", b"\xff", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"],
        ids=["empty", "object", "null", "no text", "nested"],
    )
    def test_what_is_no_signature(self, content: bytes) -> None:
        refused(archive([(i, content if i.name == SIGNATURE else c) for i, c in members(GOOD)]))


@pytest.mark.parametrize(
    "card",
    [
        b"",
        b"\xff",
        b"{}",
        b'{"kind":"spy"}',
        b'{"kind":"student"}',
        msgspec.json.encode(STUDENT).replace(b'"format":1', b'"format":2'),
        b'{"kind":"student","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["empty", "no text", "object", "other kind", "fields missing", "format", "nested"],
)
def test_a_card_that_cannot_be_used_is_refused_though_signed(card: bytes) -> None:
    assert CARD in refused(signed({CARD: card, **FILES}))


def test_a_file_the_card_names_and_the_archive_lacks() -> None:
    with pytest.raises(CheckFailed, match=r"'other\.onnx'"):
        unpack(GOOD, TRUSTED).file("other.onnx")
