"""What tests and benchmarks both need: the float64 oracle, scenarios, and what formats promise."""
