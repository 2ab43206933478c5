"""`edge-teacher check` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_teacher import check, cli
from edge_teacher.runtime.machine import Machine
from tests.edge_teacher.nets import COORDINATOR, OWNER, student, teacher_bundle
from tests.edge_teacher.runtime.fake_gpu import FakeDriver, FakeTensorRT, fake_cuda
from tests.edge_teacher.test_cli import save_public

ABSENT = {
    "tensorrt",
    "onnxruntime TensorrtExecutionProvider",
    "onnxruntime CUDAExecutionProvider",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_public(tmp_path / "owner.pub", OWNER)
    save_public(tmp_path / "coordinator.pub", COORDINATOR)
    (tmp_path / "teacher.fedsa").write_bytes(teacher_bundle())
    (tmp_path / "student.fedsa").write_bytes(student()[1])
    (tmp_path / "wrong.fedsa").write_bytes(student(order=(1, 2, 0))[1])
    (tmp_path / "garbage").write_bytes(b"garbage")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(bundle: str = "teacher.fedsa", key: str = "owner.pub", *more: str) -> list[str]:
    return ["check", "--bundle", bundle, "--owner-key", key, *more]


@pytest.mark.usefixtures("folder")
class TestOnThisMachine:
    def test_the_cpu_is_picked_with_a_line_for_each_thing_that_is_not(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(words()) == 0
        said = capsys.readouterr().out.splitlines()
        (picked,) = [line for line in said if line.startswith("picked: ")]
        assert picked.startswith("picked: onnxruntime CPUExecutionProvider fp32")
        unused = {line.split(": ")[1] for line in said if line.startswith("not used: ")}
        assert unused == ABSENT
        (row,) = [line for line in said if line.startswith("*")]
        # mark, three words of the choice, load, build, two times, memory, difference
        assert len(row.split()) == 10

    def test_as_json_it_says_everything(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(words("teacher.fedsa", "owner.pub", "--json", "--threads", "2")) == 0
        report = json.loads(capsys.readouterr().out)
        (choice,) = report["choices"]
        assert choice["state"] == "picked"
        assert all(ms > 0 for ms in choice["ms_per_image"])
        assert choice["memory_bytes"] >= 0
        assert report["device"]["memory_bytes"] > 1 << 20
        assert set(report["why_not"]) == ABSENT
        assert report["runtime"]["threads"] == 2
        assert (report["images"], report["own_probe"]) == (16, False)

    def test_a_student_is_checked_with_its_canary(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(words("student.fedsa", "coordinator.pub")) == 0
        assert "images of the bundle" in capsys.readouterr().out
        assert cli.main(words("wrong.fedsa", "coordinator.pub")) == 1
        assert "of its canary batch as at export" in capsys.readouterr().err


BAD = [
    (["check"], 2, "--bundle, --owner-key"),
    (words("nowhere"), 2, "nowhere cannot be read"),
    (words("garbage"), 1, "damaged or no bundle"),
    (words(key="coordinator.pub"), 1, "not trusted here"),
    (words("teacher.fedsa", "garbage"), 2, "garbage is no readable public key"),
    (words("teacher.fedsa", "owner.pub", "--threads", "0"), 2, "'0' is no number of cores"),
]


@pytest.mark.parametrize(("arguments", "code", "sentence"), BAD, ids=lambda a: str(a)[:60])
@pytest.mark.usefixtures("folder")
def test_bad_input_is_one_sentence_and_the_documented_code(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = cli.main(arguments)
    except SystemExit as end:  # argparse ends so
        found = end.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert (found, said.out) == (code, "")
    assert sentence in said.err.strip().splitlines()[-1]
    assert "Traceback" not in said.err


def test_a_device_without_onnx_runtime_and_without_a_gpu_is_told_so_in_one_sentence(
    folder: Path,
) -> None:
    """Everything is imported without it: JetPack's TensorRT may be all there is."""
    program = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from edge_teacher.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge-teacher: nothing on this machine executes teacher.onnx (")
    assert "onnxruntime: Python" in line


def test_with_a_gpu_every_choice_has_its_line_and_engines_are_left_for_the_agent(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    def machine() -> Machine:
        cuda = fake_cuda(FakeDriver(integrated=True))
        return Machine(cuda, FakeTensorRT("10.16.2"), onnxruntime, {"other": "not here"})

    monkeypatch.setattr(check, "find_machine", machine)
    assert cli.main(words("teacher.fedsa", "owner.pub", "--state", "state")) == 0
    said = capsys.readouterr().out
    assert "GPU           Orin, architecture 8.7, 1.1 GB, memory shared with the CPU" in said
    assert "TensorRT      tensorrt 10.16.2" in said
    for choice in ("onnxruntime CPUExecutionProvider fp32", "tensorrt Orin fp32"):
        assert choice in said
    assert len(list((folder / "state" / "engines").glob("*.engine"))) == 1
    assert said.count("picked: ") == 1
    report = check.check(
        check.bundles.read(Path("teacher.fedsa"), [OWNER.public_key()]),
        "teacher.fedsa",
        threads=1,
        engines=folder / "state" / "engines",
    )
    assert report.choices[1].build_s is None  # it was there
    assert msgspec.json.decode(msgspec.json.encode(report), type=check.Report) == report
