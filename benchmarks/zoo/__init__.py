"""Public architectures, ours against torch-pruning: ``python -m benchmarks.zoo``."""
