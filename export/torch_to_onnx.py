"""torch.onnx, quietly: one float image batch in, named outputs out, any batch size, opset 18."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Sequence

import onnx
import torch
from torch import nn

from edge_teacher.contract.errors import CheckFailed

OPSET = 18
_TALKATIVE = ("torch.onnx", "torch.fx", "torch.export", "onnxscript", "onnx_ir")


_OPERATOR = re.compile(r"translating node .*target=torch\.ops\.([\w.]+?)(\.default)?\]")


def torch_to_onnx(
    module: nn.Module, shape: tuple[int, int, int], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Export `module` taking float32[N, *shape]. Raises CheckFailed with torch's own reason."""
    example = torch.zeros(2, *shape)
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            # A network that it cannot follow it prints there, whole.
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                verbose=False,
            )
    except Exception as error:
        # torch.export raises many kinds; all mean that this module cannot be exported as it is.
        raise CheckFailed(f"torch cannot export this network to ONNX: {why_not(error)}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    return program.model_proto


def why_not(error: Exception) -> str:
    """Of what torch says of a network it cannot follow, what is about the network, and what to do."""
    said = str(error.__cause__ or error).strip() or type(error).__name__
    operator = _OPERATOR.search(said)
    if operator:
        return f"ONNX has no form of its operator {operator[1]}; use others in its forward"
    if "data-dependent" in said:
        return (
            "a branch or a shape in its forward depends on the values of a tensor; write it without, "
            "with torch.where say"
        )
    return (
        f"{said.splitlines()[0]}; write its forward without Python branches on values and without a "
        "fixed batch"
    )
