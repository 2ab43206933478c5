"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed, RuntimeFailed
from edge_teacher.contract.messages import RuntimeInfo


class OnnxRuntimeSession:
    """One graph on `threads` cores."""

    def __init__(self, graph: bytes, *, threads: int, name: str = "the graph") -> None:
        """Raises CheckFailed if the runtime cannot load the graph or it is no teacher or student."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Several agents share a machine in the demo; a spinning thread would take a neighbour's core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT raises bare pybind classes of its own
            raise CheckFailed(
                f"ONNX Runtime {ort.__version__} cannot load {name}: {error}"
            ) from error
        inputs = self._session.get_inputs()
        if [i.name for i in inputs] != ["images"] or inputs[0].type != "tensor(uint8)":
            found = ", ".join(f"{i.name}: {i.type}" for i in inputs)
            raise CheckFailed(f"{name} takes ({found}), and must take images: uint8[N, H, W, 3]")
        self._outputs = tuple(output.name for output in self._session.get_outputs())
        self._threads = threads
        self._options = ort.RunOptions()
        # Without it every output of the graph is computed, also those nobody asks for.
        self._options.only_execute_path_to_fetches = True

    @property
    def info(self) -> RuntimeInfo:
        return RuntimeInfo(
            name="onnxruntime",
            version=ort.__version__,
            provider=self._session.get_providers()[0],
            threads=self._threads,
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._outputs

    def run(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        try:
            found = self._session.run(list(outputs), {"images": images}, self._options)
        except Exception as error:  # as above
            raise RuntimeFailed(
                f"ONNX Runtime failed on images {list(images.shape)}: {error}"
            ) from error
        return dict(zip(outputs, found, strict=True))
