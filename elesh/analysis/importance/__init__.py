"""What a unit is worth: scores, output projections, redundancy, history."""
