"""The old module name of ``groups_of`` (now in ``fan_out``); it goes with the next version."""

from .fan_out import groups_of

__all__ = ["groups_of"]
