"""Executing a graph: one Session interface, chosen by what the device has."""
