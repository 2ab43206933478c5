"""How an answer is read off a student's logits, for every kind of task there is or may come.

A device needs no more of a kind than this: where the classes are (axis 1) and which of them an answer is.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed

Decision = Literal["top-1", "each"]
"""`top-1`: the class with the largest logit, at every position. `each`: every class whose logit is above 0."""


def decisions(logits: NDArray[Any], decision: str) -> NDArray[Any]:
    """logits [N, classes, …] -> int64[N, …] for `top-1`, bool[N, classes, …] for `each`.

    Raises CheckFailed for a decision this version does not know.
    """
    if decision == "top-1":
        return np.asarray(logits.argmax(1))
    if decision == "each":
        return np.asarray(logits > 0)
    raise CheckFailed(
        f"this student's answers are read as {decision!r}, and this version reads "
        f"{', '.join(get_args(Decision))}: update the software of this machine"
    )
