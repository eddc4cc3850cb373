"""Proves on a copy of the network that a mask and a cut are the same."""
