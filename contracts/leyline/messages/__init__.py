"""The messages of the bus: events, requests, decisions, outcomes, audit entries."""
