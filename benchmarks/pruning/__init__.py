"""Benchmarks of the method: what is kept after cuts, and how well that is predicted."""
