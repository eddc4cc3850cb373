"""Importance of units: scores, output projections, redundancy, history."""
