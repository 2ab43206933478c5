"""The workstation: finds teachers, selects, trains a student, ships it, reports."""
