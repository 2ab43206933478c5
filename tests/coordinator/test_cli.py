"""Bad input: one sentence on stderr, the documented exit code, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from coordinator import files
from coordinator.cli import main
from coordinator.terminal import printable
from edge_teacher.contract.errors import UsageError
from edge_teacher.files import locked
from edge_teacher.keys import private_key_at
from tests.brokers import Mosquitto, free_port
from tests.examples import ROOT

PROBE = "examples/data/cifar10-mini.tar.xz/probe"
TRANSFER = "examples/data/cifar10-mini.tar.xz/transfer"


def fedsa(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        check=False,
    )


def one_sentence(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fedsa: ")
    for word in words:
        assert word in last


def train(folder: Path, *more: object, broker: str = "mqtt://127.0.0.1:9") -> list[object]:
    return [
        *("train", "--task", "t", "--signing-key", folder / "c.key", "--runs", folder / "runs"),
        *("--broker", broker, "--data.probe", PROBE, "--data.transfer", TRANSFER),
        *more,
    ]


def test_an_unreachable_broker(tmp_path: Path) -> None:
    port = free_port()
    address = f"mqtt://127.0.0.1:{port}"
    one_sentence(fedsa("devices", "--broker", address), 1, "no broker answers", str(port))
    one_sentence(fedsa(*train(tmp_path, broker=address)), 1, "no broker answers", str(port))
    assert not (tmp_path / "runs").exists()


def test_an_address_that_is_none() -> None:
    one_sentence(fedsa("devices", "--broker", "localhost:1883"), 2, "'localhost:1883'", "mqtt://")


def test_a_host_that_can_be_none() -> None:
    for host in ("a..b", "x" * 70):
        one_sentence(fedsa("devices", "--broker", f"mqtt://{host}:1883"), 2, host[:20], "mqtt://")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


def test_a_picture_that_claims_too_many_pixels(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    header = png_chunk(b"IHDR", struct.pack("!IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    done = fedsa(
        *("predict", "--broker", "mqtt://127.0.0.1:9", "--device", "d", "--task", "t", bomb)
    )
    one_sentence(done, 2, "bomb.png", "pixels")


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1", "soon"])
def test_a_time_that_is_none(seconds: str) -> None:
    done = fedsa("devices", "--broker", "mqtt://127.0.0.1:9", f"--wait={seconds}")
    assert done.returncode == 2
    assert "is no time: take 0 to 3600 seconds" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_teachers_wanted_than_there_are_leaves_no_folder(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    done = fedsa(*train(tmp_path, "--device", "d9", broker=str(mosquitto.address)))
    one_sentence(done, 1, "d9")
    assert not (tmp_path / "runs").exists()


def test_one_command_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path, "command"), pytest.raises(UsageError, match="another command is at work"):
        locked(tmp_path, "command").__enter__()
    with locked(tmp_path, "command"):
        pass


def test_what_a_device_calls_itself_does_not_command_the_terminal() -> None:
    assert printable("a\x1b[31mred\x07 b") == "a\ufffd[31mred\ufffd b"


def test_a_full_disk_while_training_is_a_sentence(tmp_path: Path) -> None:
    def no_space(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_atomically", no_space)
        with pytest.raises(OSError, match="No space left"):
            files.save_tensors(tmp_path / "s.pt", {"w": torch.zeros(9)})


def test_the_workstation_s_command_says_what_is_missing_on_a_device() -> None:
    script = "import sys; sys.modules['rich'] = None\nfrom coordinator.entry import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    one_sentence(done, 2, "rich", "fedsa-edge[coordinator]")


def test_an_unknown_configuration_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[selection]\nkk = 3\n")
    done = fedsa(*train(tmp_path, "--config", tmp_path / "c.toml"))
    one_sentence(done, 2, "selection.kk", "selection.k")


def test_a_value_of_the_wrong_type(tmp_path: Path) -> None:
    one_sentence(fedsa(*train(tmp_path, "--selection.k", "many")), 2, "selection.k", "many")


def test_a_setting_that_must_be_given(tmp_path: Path) -> None:
    done = fedsa("train", "--task", "t", "--signing-key", tmp_path / "k", "--broker", "mqtt://h")
    one_sentence(done, 2, "data.probe")


def test_a_probe_set_of_one_class(tmp_path: Path) -> None:
    one = tmp_path / "probe.npz"
    np.savez(one, images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.zeros(4, np.int64))
    one_sentence(fedsa(*train(tmp_path, "--data.probe", one)), 2, "probe.npz", "class")


def test_images_of_the_wrong_shape(tmp_path: Path) -> None:
    wrong = tmp_path / "probe.npz"
    np.savez(wrong, images=np.zeros((4, 32, 32), np.uint8), labels=np.array([0, 0, 1, 1]))
    one_sentence(fedsa(*train(tmp_path, "--data.probe", wrong)), 2, "probe.npz")


def test_data_that_is_not_there(tmp_path: Path) -> None:
    done = fedsa(*train(tmp_path, "--data.probe", tmp_path / "absent"))
    one_sentence(done, 2, "absent")


def test_no_teacher_at_all(tmp_path: Path, mosquitto: Mosquitto) -> None:
    done = fedsa(*train(tmp_path, broker=str(mosquitto.address)))
    one_sentence(done, 1, "0 of 1 teacher announced", "agents running")
    assert not (tmp_path / "runs").exists()


def test_a_demo_without_bundles(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(ROOT / "examples" / "data")
    done = fedsa("demo", "--examples", tmp_path, "--runs", tmp_path / "runs")
    one_sentence(done, 2, "no teacher bundles")
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(200)
def test_a_demo_with_a_corrupt_bundle_names_it_and_ends_everything(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    examples = tmp_path / "examples"
    (examples / "teachers").mkdir(parents=True)
    (examples / "data").symlink_to(ROOT / "examples" / "data")
    private_key_at(examples / "teachers" / "owner.key")
    (examples / "teachers" / "teacher-x.fedsa").write_bytes(b"\0" * 2048)
    done = fedsa("demo", "--examples", examples, "--runs", tmp_path / "runs")
    one_sentence(done, 1, "teacher-x.fedsa")
    assert not (tmp_path / "runs" / "latest").exists()


def test_a_port_in_use(tmp_path: Path, mosquitto: Mosquitto) -> None:
    examples = tmp_path / "examples"
    (examples / "teachers").mkdir(parents=True)
    (examples / "data").symlink_to(ROOT / "examples" / "data")
    (examples / "teachers" / "teacher-x.fedsa").touch()
    done = fedsa(
        *("demo", "--examples", examples, "--runs", tmp_path / "runs", "--port", mosquitto.port)
    )
    one_sentence(done, 2, f"port {mosquitto.port} is in use")


def test_a_bundle_signed_by_somebody_else(tmp_path: Path) -> None:
    private_key_at(tmp_path / "mine.key")
    with tarfile.open(tmp_path / "s.fedsa", "w"):
        pass
    done = fedsa(
        *("deploy", "--broker", "mqtt://127.0.0.1:9", "--bundle", tmp_path / "s.fedsa"),
        *("--trusted-key", tmp_path / "mine.pub"),
    )
    one_sentence(done, 1, "s.fedsa", "no fedsa bundle")


def test_a_student_that_is_no_student(tmp_path: Path) -> None:
    (tmp_path / "student.pt").write_bytes(b"nonsense")
    done = fedsa(
        *("export", "student", "--student", tmp_path / "student.pt", "--task", "t"),
        *(
            "--calibration",
            TRANSFER,
            "--signing-key",
            tmp_path / "k.key",
            "--out",
            tmp_path / "s.fedsa",
        ),
    )
    one_sentence(done, 2, "student.pt")
    assert not (tmp_path / "s.fedsa").exists()


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    done = fedsa("key", "--out", "/dev/full/owner.key")
    one_sentence(done, 1, "/dev/full")


def test_devices_as_json_where_there_are_none(
    mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "--broker", str(mosquitto.address), "--wait", "0.2", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out) == []


def test_the_printed_settings_are_accepted_again(tmp_path: Path) -> None:
    printed = fedsa("config")
    assert printed.returncode == 0
    (tmp_path / "c.toml").write_text(printed.stdout)
    done = fedsa(*train(tmp_path, "--config", tmp_path / "c.toml"))
    one_sentence(done, 1, "no broker answers")
