"""Benchmarks of speed and memory of analysis, recorder and selection."""
