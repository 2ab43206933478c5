"""What runs on a device: a teacher that answers questions, and the students deployed to it."""

__version__ = "0.1.0"
