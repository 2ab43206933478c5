"""The language both machines speak: topics, messages, tensors, errors and limits."""

PROTOCOL = "1.3"
"""major.minor. Peers of one major version understand each other; the topic root carries the major."""
