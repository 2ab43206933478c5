"""Networks in, bundles out: teachers for devices, students from training."""

import edge_teacher  # noqa: F401  # it keeps ONNX Runtime from reporting, and must come before it
