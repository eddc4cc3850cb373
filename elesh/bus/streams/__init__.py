"""Entries of streams: consumer groups, leases, reaping, fan-out, dead letters."""
