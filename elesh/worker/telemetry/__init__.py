"""A worker's telemetry: reports, gauges, health, registry entry."""
