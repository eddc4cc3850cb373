"""Benchmarks of the console and the report at the size of a team."""
