"""Commands for whoever operates a fleet: breakers, dead letters, events, audit, console."""
