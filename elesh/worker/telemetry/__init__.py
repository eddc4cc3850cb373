"""What a worker says of itself: reports, gauges, health, its line in the registry."""
