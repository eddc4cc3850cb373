"""Commands for operators of a fleet: breakers, dead letters, events, audit, console."""
