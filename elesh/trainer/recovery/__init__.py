"""Where a run stands, so that it can go back or on: restore points, journal, snapshots."""
