from __future__ import annotations

import numpy as np


def same(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    """Shape and values, with the largest difference in the message."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance
