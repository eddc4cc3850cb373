"""Measurements that are no tests: run them as ``python -m benchmarks.<name>``."""
