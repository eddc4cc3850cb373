"""What can be removed: dependency graph, groups, attention, residual blocks, proofs."""
