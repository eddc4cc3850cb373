"""Which units go, and in which order: removal orders, noise, schedule, limits."""
