"""What can be wrong with a network somebody brings.

UsageError (exit 2)
└── UnsupportedNetwork          no image input, several inputs, a batch that cannot vary, …
    └── UnsupportedOperator     a derivative is needed through a node that has no rule
"""

from __future__ import annotations

from edge_teacher.contract.errors import UsageError


class UnsupportedNetwork(UsageError):
    """The file is a valid ONNX model, and no teacher can be made of it as asked."""


class UnsupportedOperator(UnsupportedNetwork):
    """The derivative has to pass a node that no rule covers.

    `op` is the operator type, `node` the node's name (or its first output, where it has none), `reason` why,
    and `nearest_tap` the earliest tensor after that node from which Grad-CAM would work (None: there is none).
    """

    def __init__(self, op: str, node: str, reason: str, nearest_tap: str | None = None) -> None:
        self.op, self.node, self.reason, self.nearest_tap = op, node, reason, nearest_tap
        advice = (
            f"tap {nearest_tap!r}, which lies after it, or use kind eigencam"
            if nearest_tap
            else "use kind eigencam, which needs no derivative"
        )
        super().__init__(
            f"no derivative through operator {op} at node {node!r}: {reason}; {advice}"
        )

    def with_nearest(self, tap: str | None) -> UnsupportedOperator:
        """The same refusal, naming the tap from which it would work."""
        return UnsupportedOperator(self.op, self.node, self.reason, tap)
