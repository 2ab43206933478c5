"""Deployed students: verify, canary, switch between two slots, roll back."""

from edge_teacher.slots.students import ActiveStudent, Students

__all__ = ["ActiveStudent", "Students"]
