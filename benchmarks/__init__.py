"""Commands that produce the numbers of the README: each prints a table and writes JSON."""
