"""Whether NVIDIA's real bindings, from JetPack 6's to the newest, have every call that is made here.

They are imported over libraries of nothing but names: classes, enums and signatures are the true ones, and
nothing can be executed. `.ci/run` installs them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.edge_teacher.runtime.stub_library import stub_library

VERSIONS = {
    "10.3.0": "JetPack 6.1 and 6.2",
    "10.13.3.9": "JetPack 7.0 and 7.1",
    "10.16.1.11": "nearest to JetPack 7.2",
    "11.4.0.106": "workstations",
}
ROOT = Path(__file__).resolve().parents[3]
BINDINGS = Path(sys.prefix) / "tensorrt-bindings"
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)

USED = {
    "Builder": "build_serialized_network create_builder_config create_network "
    "create_optimization_profile",
    "INetworkDefinition": "get_input num_inputs",
    "ITensor": "name",
    "OnnxParser": "get_error num_errors parse",
    "IBuilderConfig": "add_optimization_profile builder_optimization_level clear_flag "
    "create_timing_cache get_timing_cache progress_monitor set_flag set_memory_pool_limit "
    "set_timing_cache",
    "IOptimizationProfile": "set_shape",
    "ITimingCache": "serialize",
    "IProgressMonitor": "phase_finish phase_start step_complete",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "create_execution_context get_tensor_dtype get_tensor_name num_io_tensors",
    "IExecutionContext": "active_optimization_profile execute_async_v3 get_tensor_shape "
    "set_input_shape set_optimization_profile_async set_tensor_address",
    "ILogger": "ERROR INTERNAL_ERROR",
    "MemoryPoolType": "WORKSPACE",
    "BuilderFlag": "TF32",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "IHostMemory": "nbytes",
}
"""Class -> everything that edge_teacher/runtime/tensorrt asks of it."""

SIGNATURES = {
    "IBuilderConfig.set_timing_cache": "ignore_mismatch",
    "IExecutionContext.set_optimization_profile_async": "stream_handle",
    "IExecutionContext.execute_async_v3": "stream_handle",
    "IExecutionContext.set_tensor_address": "memory",
    "IOptimizationProfile.set_shape": "opt",
    "IBuilderConfig.set_memory_pool_limit": "pool_size",
    "Builder.create_network": "flags",
}
"""Call -> an argument that must be there by this name, so that it means what it is taken for."""

_LOOK = """
import json, sys
import numpy as np
import tensorrt_bindings as trt
from edge_teacher.runtime.opened import Watch
from edge_teacher.runtime.tensorrt.build import _monitor, logger
from edge_teacher.runtime.tensorrt.key import version_of

used, signatures = json.loads(sys.argv[1])
missing = []
for kind, names in used.items():
    found = getattr(trt, kind, None)
    missing += [f"{kind}.{name}" for name in names.split() if not hasattr(found, name)]
for call, argument in signatures.items():
    kind, name = call.split(".")
    if argument not in (getattr(getattr(trt, kind), name).__doc__ or ""):
        missing.append(f"{call}({argument})")

log = logger(trt)
log.log(trt.ILogger.ERROR, "said")
log.log(trt.ILogger.INFO, "not kept")
told = []
monitor = _monitor(trt, Watch(progress=told.append))
monitor.phase_start("build", None, 2)
monitor.step_complete("build", 0)
flags = [name for name in dir(trt.BuilderFlag) if name in ("FP16", "INT8", "BF16", "FP8")]
print(json.dumps({
    "version": version_of(trt),
    "missing": missing,
    "strongly_typed": int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
    "said": log.since(0),
    "told": told,
    "float": np.dtype(trt.nptype(trt.DataType.FLOAT)).name,
    "precision_flags": flags,
}))
"""


def look(version: str, folder: Path) -> dict[str, Any]:
    """What the bindings of a version have, seen by a process of its own."""
    installed = BINDINGS / version
    if not installed.is_dir():
        pytest.skip(f"no bindings {version} in {BINDINGS}; .ci/run installs them")
    if platform.machine() != "x86_64":
        pytest.skip("the libraries of nothing but names are written for x86-64")
    major = version.split(".")[0]
    for name in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        soname = f"{name}.so.{major}"
        (folder / soname).write_bytes(stub_library(soname, FUNCTIONS))
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, json.dumps([USED, SIGNATURES])],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{installed}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_made_here_is_there(version: str, tmp_path: Path) -> None:
    found = look(version, tmp_path)
    assert found["missing"] == []
    assert found["version"] == f"tensorrt_bindings {version}"
    # The flag has moved: who writes its number instead of its name has another flag in 11.
    assert found["strongly_typed"] == (1 if version.startswith("10.") else 0)
    assert found["float"] == "float32"
    # Classes of ours under theirs work: errors are kept, progress is told.
    assert (found["said"], found["told"]) == ("said", [0.5])
    # Why precision is decided in the graph: the flags of 10 are gone in 11.
    assert bool(found["precision_flags"]) is version.startswith("10.")
