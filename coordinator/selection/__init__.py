"""Which teachers take part: strategies behind one small interface."""

from coordinator.selection.choice import Evidence, Selection, Strategy, TeacherScore
from coordinator.selection.saliency import (
    common_size,
    probabilities,
    resize_maps,
    similarities,
    transfer_distance,
)
from coordinator.selection.strategies import STRATEGIES, select, strategy_named

__all__ = [
    "STRATEGIES",
    "Evidence",
    "Selection",
    "Strategy",
    "TeacherScore",
    "common_size",
    "probabilities",
    "resize_maps",
    "select",
    "similarities",
    "strategy_named",
    "transfer_distance",
]
