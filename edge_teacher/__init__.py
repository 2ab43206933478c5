"""What runs on a device: a teacher that answers questions, and the students deployed to it."""

import os

# ONNX Runtime's official builds send usage events to Microsoft unless this is set before it is loaded (its
# Privacy.md), and keep an identifier of the machine. A device that guards private teachers tells nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
