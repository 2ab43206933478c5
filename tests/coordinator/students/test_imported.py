"""A user's own network goes every way that ours go."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.packaging import package_student
from coordinator.pipeline import TaskRun, Timings, require_exportable_student, run_task
from coordinator.progress import Silent
from coordinator.ranks import ALONE
from coordinator.settings import load_config
from coordinator.student import Student, StudentSpec, grad_cam, load_student, predict, save_student
from coordinator.training import train
from edge_teacher import bundle as bundles
from edge_teacher.contract.errors import CheckFailed, UsageError
from export.student import FP32, INT8_CPU, INT8_TENSORRT
from tests.coordinator.local_teacher import coloured_images
from tests.coordinator.test_training import DATA, Interrupted, Watch, teachers, variant

HERE = "tests.coordinator.students.own_network"
IMAGES = coloured_images(8, 3, seed=0, size=16)[0]
CLASSES = ("a", "b", "c")


def student(module: str, layer: str = "") -> Student:
    path = module if ":" in module else f"{HERE}:{module}"
    torch.manual_seed(0)
    return Student(StudentSpec.of_images(IMAGES, CLASSES, 8, module=path, feature_layer=layer))


def test_the_feature_map_is_the_layers_output() -> None:
    made = student("resnet", "layer4").eval()
    assert made.features == 16
    assert tuple(made.feature_map(torch.from_numpy(IMAGES)).shape) == (8, 16, 4, 4)
    assert grad_cam(made, IMAGES).shape == (8, 4, 4)
    whole = made.stages.module  # type: ignore[union-attr]
    x = made.normalise(torch.from_numpy(IMAGES))
    by_hand = whole.layer4(whole.layer1(whole.maxpool(torch.relu(whole.bn1(whole.conv1(x))))))
    assert torch.equal(made.feature_map(torch.from_numpy(IMAGES)), by_hand)


def test_what_lies_behind_the_layer_is_gone_and_what_lies_before_it_stays() -> None:
    names = set(student("resnet", "layer4").state_dict())
    assert not [name for name in names if ".fc." in name or ".forgotten." in name]
    assert "stages.module.layer4.1.conv2.weight" in names
    assert "stages.module.layer1.downsample.0.weight" in names
    assert sum(p.numel() for p in student("resnet", "layer4").parameters()) < 20_000


def test_a_module_may_be_its_own_feature_map() -> None:
    made = student("only_features")
    assert made.features == 10
    assert predict(made, IMAGES).shape == (8, 3)


CONFIG = variant(
    student__module=f"{HERE}:resnet",
    student__feature_layer="layer4",
    aggregation__rounds="2",
    scratch__epochs="1",
    aggregation__form="joint",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    train(CONFIG, DATA, teachers(), folder)
    return folder


def test_it_is_trained_and_comes_back_from_its_file(folder: Path, tmp_path: Path) -> None:
    loaded = load_student(folder / "student.pt")
    assert loaded.spec.module == f"{HERE}:resnet"
    assert loaded.spec.feature_layer == "layer4"
    save_student(loaded, tmp_path / "again.pt")
    again = load_student(tmp_path / "again.pt")
    assert np.array_equal(predict(again, IMAGES), predict(loaded, IMAGES))


def test_its_run_goes_on_to_the_same_weights_with_its_dropout(folder: Path, tmp_path: Path) -> None:
    import msgspec

    config = msgspec.structs.replace(CONFIG, checkpoint_s=0.0)
    with pytest.raises(Interrupted):
        train(config, DATA, teachers(), tmp_path, Watch("round 2", 3))
    train(config, DATA, teachers(), tmp_path)
    assert (tmp_path / "student.pt").read_bytes() == (folder / "student.pt").read_bytes()


def test_its_bundle_has_all_files_and_none_of_the_dead_layers(folder: Path) -> None:
    key = Ed25519PrivateKey.generate()
    loaded = load_student(folder / "student.pt")
    packaged = package_student(loaded, "own", 1, DATA.transfer, DATA.test, key, largest_drop=1.0)
    files = packaged.report.files
    assert set(files) == {FP32, INT8_CPU, INT8_TENSORRT}
    assert files[INT8_CPU].agreement > 0.9
    assert files[INT8_TENSORRT].agreement > 0.9
    unpacked = bundles.unpack(packaged.bundle, [key.public_key()])
    model = onnx.load(io.BytesIO(unpacked.files[FP32]))
    weights = {i.name: int(np.prod(i.dims)) for i in model.graph.initializer}
    assert not [name for name in weights if "fc" in name or "forgotten" in name]
    parameters = sum(p.numel() for p in loaded.parameters())
    assert packaged.report.parameters == parameters
    # Batch norm folds away, so a few more constants than parameters at most.
    assert sum(weights.values()) < 1.2 * parameters + 1000
    assert "Dropout" not in {node.op_type for node in model.graph.node}


def test_a_file_whose_module_is_not_here_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere.py").write_text(
        f"from {HERE} import resnet, only_features\n\ndef make():\n    return only_features()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    save_student(student("elsewhere:make"), tmp_path / "student.pt")
    monkeypatch.undo()
    import sys

    sys.modules.pop("elsewhere")
    with pytest.raises(UsageError, match=r"student\.pt cannot be loaded: .*elsewhere.*PYTHONPATH"):
        load_student(tmp_path / "student.pt")


@pytest.mark.parametrize(
    ("module", "layer", "words"),
    [
        (
            "no_such_package_at_all:net",
            "",
            r"cannot be imported here \(No module named .*PYTHONPATH",
        ),
        ("resnet18", "", r"has no attribute 'resnet18'"),
        ("fails", "", r"called without arguments, fails: RuntimeError: no weights here"),
        ("no_module", "", r"gives a int, and must give a torch.nn.Module"),
        ("takes_one_channel", "", r"cannot take two images .*RuntimeError"),
        ("resnet", "", r"has the shape \[2, 1000\] for two images and must be \[N, C, h, w\]"),
        ("resnet", "layer5", r"has no layer 'layer5' .*; did you mean 'layer4'\?"),
        ("resnet", "zzz", r"has no layer 'zzz' .*; its layers are conv1, bn1"),
        ("resnet", "forgotten", r"'forgotten' is never run"),
        ("resnet", "avgpool", r"is one pixel for images of 16x16"),
        (":", "", r"must be package\.module:factory"),
    ],
)
def test_what_is_wrong_with_a_module_is_one_sentence(module: str, layer: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        student(module, layer)
    assert "\n" not in str(caught.value)


def test_a_layer_without_a_module_is_said() -> None:
    with pytest.raises(UsageError, match=r"feature_layer names a layer of student\.module"):
        load_config(None, {"student.feature_layer": "layer4"}, {})


def test_what_the_users_code_raises_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="called without arguments, fails: SystemExit"):
        student("leaves")


def test_a_network_that_fails_in_the_midst_of_training_is_named(tmp_path: Path) -> None:
    late = msgspec.structs.replace(
        CONFIG,
        student=msgspec.structs.replace(CONFIG.student, module=f"{HERE}:late", feature_layer=""),
    )
    with pytest.raises(CheckFailed, match=r"own_network:late fails in .*: RuntimeError: not today"):
        train(late, DATA, teachers(), tmp_path)


@pytest.mark.parametrize("layer", ["", "behind"])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("branching", "a branch or a shape in its forward depends on the values"),
        ("special", "ONNX has no form of its operator prims.bessel_j0"),
    ],
)
def test_a_network_that_cannot_be_exported_is_refused_before_it_is_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], network: str, layer: str, words: str
) -> None:
    config = msgspec.structs.replace(
        CONFIG,
        student=msgspec.structs.replace(
            CONFIG.student, module=f"{HERE}:{network}", feature_layer=layer
        ),
    )
    run = TaskRun(
        command="fedsa train",
        task="t",
        config=config,
        data=DATA,
        folder=tmp_path / "run",
        cache=tmp_path / "answers",
        key=Ed25519PrivateKey.generate(),
        deploy=False,
    )
    nobody: Any = None  # nobody is asked anything
    with pytest.raises(CheckFailed, match=words) as caught:
        run_task(run, nobody, [], Silent(), Timings())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_one_that_can_is_checked_once(tmp_path: Path) -> None:
    own = msgspec.structs.replace(CONFIG.student, module=f"{HERE}:resnet", feature_layer="layer4")
    config = msgspec.structs.replace(CONFIG, student=own)
    require_exportable_student(config, DATA, tmp_path, ALONE)
    # One that is gone on with is not checked again, whatever became of its module.
    gone = msgspec.structs.replace(
        CONFIG, student=msgspec.structs.replace(own, module="no.such:net")
    )
    with pytest.raises(UsageError, match=r"no\.such"):
        require_exportable_student(gone, DATA, tmp_path, ALONE)
    (tmp_path / "checkpoint.pt").touch()
    require_exportable_student(gone, DATA, tmp_path, ALONE)
