"""What tests and benchmarks share: the float64 oracle, scenarios, formats, and compilers."""
