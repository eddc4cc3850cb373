"""The state of a run, so that it can go back or continue: restore points, journal, snapshots."""
