"""How much code a reader meets: one checkpoint traced through all three processes."""
