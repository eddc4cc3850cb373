"""Layers whose weights are computed, or lie together in one tensor."""
