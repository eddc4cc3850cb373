"""The pruning set: units that go together, their predicted effect, subsets, and the verdict."""
