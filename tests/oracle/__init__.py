"""Shared by tests and benchmarks: float64 reference, scenarios, formats and state machine."""
