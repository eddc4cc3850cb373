"""Layers solved again after a cut, batch statistics, matched outputs; streams turned before it."""
