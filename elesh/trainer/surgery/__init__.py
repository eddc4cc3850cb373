"""Changing a network: masks, cuts, bypass modules, weight reconstruction, undo."""
