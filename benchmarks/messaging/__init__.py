"""Benchmarks of the bus, the worker around it, and observing."""
