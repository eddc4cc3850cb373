"""What several benchmarks share: networks, training, other people's criteria, tables."""
