"""A teacher and a student small enough to be written out: their right answers are one line of numpy.

The teacher's feature map is the 2x2 mean of the picture, its saliency the mean over the colours of that;
the student's logits are the picture's mean colour: class 0 is red, 1 green, 2 blue.
"""

from __future__ import annotations

import io

import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper

from edge_teacher.bundle import StudentCard, TeacherCard, pack
from edge_teacher.contract.messages import TapInfo, TeacherInfo

SIDE = 8
TASK = "colours"
CLASSES = ("red", "green", "blue")
OWNER = Ed25519PrivateKey.from_private_bytes(b"owner".ljust(32))
COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"coordinator".ljust(32))
STRANGER = Ed25519PrivateKey.from_private_bytes(b"stranger".ljust(32))


def pictures(count: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def teacher_answers(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, 3, H/2, W/2], saliency [N, H/2, W/2]) as the teacher must give them."""
    n, height, width, _ = images.shape
    x = images.astype(np.float32).transpose(0, 3, 1, 2) / 255
    features = x.reshape(n, 3, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
    return features, features.mean(axis=1)


def student_answers(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32).mean(axis=(1, 2)) / 255


def _graph(nodes: list[onnx.NodeProto], outputs: dict[str, int], *constants: np.ndarray) -> bytes:
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
    begin = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["channels"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["channels", "full"], ["x"]),
    ]
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
        for name, rank in outputs.items()
    ]
    initialisers = [numpy_helper.from_array(np.float32(255), "full")]
    initialisers += [numpy_helper.from_array(c, f"c{i}") for i, c in enumerate(constants)]
    graph = helper.make_graph([*begin, *nodes], "tiny", [images], results, initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def teacher_graph() -> bytes:
    nodes = [
        helper.make_node(
            "AveragePool", ["x"], ["features.last"], kernel_shape=[2, 2], strides=[2, 2]
        ),
        helper.make_node("ReduceMean", ["features.last", "c0"], ["saliency"], keepdims=0),
    ]
    return _graph(nodes, {"features.last": 4, "saliency": 3}, np.array([1], np.int64))


def student_graph(order: tuple[int, int, int] = (0, 1, 2)) -> bytes:
    """Another `order` confuses the classes."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "c0"], ["colour"], keepdims=0),
        helper.make_node("Gather", ["colour", "c1"], ["logits"], axis=1),
    ]
    return _graph(nodes, {"logits": 2}, np.array([2, 3], np.int64), np.array(order, np.int64))


TEACHER = TeacherInfo(
    name="colour teacher",
    version=1,
    input_size=(SIDE, SIDE),
    taps={"last": TapInfo(channels=3, height=SIDE // 2, width=SIDE // 2)},
    saliency_tap="last",
    saliency_size=(SIDE // 2, SIDE // 2),
    saliency_kind="grad-cam",
)


def teacher_bundle(info: TeacherInfo = TEACHER, key: Ed25519PrivateKey = OWNER) -> bytes:
    return pack(TeacherCard(teacher=info), {"teacher.onnx": teacher_graph()}, key)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def student(
    version: int = 1,
    *,
    task: str = TASK,
    order: tuple[int, int, int] = (0, 1, 2),
    key: Ed25519PrivateKey = COORDINATOR,
    canary: np.ndarray | None = None,
    filler: int = 0,
    **card: object,
) -> tuple[StudentCard, bytes]:
    """A card and its bundle; with another `order` it fails its canary batch. `filler`: bytes more."""
    images = pictures(20, seed=9)
    logits = student_answers(images) if canary is None else canary
    fields = {
        "task": task,
        "version": version,
        "classes": CLASSES,
        "input_size": (SIDE, SIDE),
        "graphs": {"fp32": "student.onnx"},
        "canary_logits": {"fp32": "canary.logits.npy"},
        **card,
    }
    made = StudentCard(**fields)  # type: ignore[arg-type]
    files = {
        "student.onnx": student_graph(order),
        "canary.images.npy": npy(images),
        "canary.logits.npy": npy(logits),
        "filler": np.random.default_rng(abs(version)).bytes(filler),
    }
    return made, pack(made, files, key)
