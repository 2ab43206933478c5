"""Values of an answer in the dtype that was asked for, from the first step on."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract import quantised
from edge_teacher.contract.errors import RuntimeFailed
from edge_teacher.contract.messages import Answered, Dtype
from edge_teacher.rpc.serve import Tensors

BYTES_PER_VALUE: Mapping[Dtype, int] = {"f16": 2, "f32": 4, "u8": 14}
"""While an answer is made. u8 needs all values of a channel as float32 before it knows their range, and
two more copies of them to tell what is lost."""

_MOST_F16 = 65504
"""A feature beyond is held there rather than turned into infinity."""


class Values:
    """One tensor of one answer."""

    def __init__(self, name: str, dtype: Dtype, *, by_channel: bool) -> None:
        self._name = name
        self._dtype = dtype
        self._by_channel = by_channel
        self._spent_s = 0.0

    def kept(self, values: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
        """What is kept of a step's values, by the tensor's name."""
        if self._dtype != "f16":
            return {self._name: values.astype(np.float32, copy=False)}
        began = time.perf_counter()
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            half = np.clip(values, -_MOST_F16, _MOST_F16).astype(np.float16)
        self._spent_s += time.perf_counter() - began
        return {self._name: half}

    def answer(
        self, whole: Mapping[str, NDArray[np.generic]], answered: Answered
    ) -> tuple[Answered, Tensors]:
        """`answered` with what this tensor cost and lost besides, and the tensors it travels as.

        Raises RuntimeFailed for values that are not finite and should travel as u8.
        """
        values = whole[self._name]
        error = 0.0
        tensors: Tensors = {self._name: values}
        if self._dtype == "u8":
            began = time.perf_counter()
            if not np.isfinite(values).all():
                raise RuntimeFailed(
                    f"the {self._name} are not all finite; ask for them as f32 to see them"
                )
            floats = values.astype(np.float32, copy=False)
            tensors = quantised.quantise(floats, self._name, by_channel=self._by_channel)
            error = quantised.relative_error(floats, quantised.floats(tensors, self._name))
            self._spent_s += time.perf_counter() - began
        return msgspec.structs.replace(
            answered,
            encode_ms=round(answered.encode_ms + self._spent_s * 1e3, 3),
            encode_error=max(answered.encode_error, error),
        ), tensors
