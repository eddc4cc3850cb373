"""A training run on the bus: session, bus thread, restore points, journal, monitoring window."""
