"""Commands that measure what the README claims: each prints its table and writes JSON."""
