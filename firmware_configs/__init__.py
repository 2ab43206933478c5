"""Everything flashed that is not Python."""
