"""The networks a student may be: each file one architecture, `imported` whatever else a user brings."""
