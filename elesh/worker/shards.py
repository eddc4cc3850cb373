"""``groups_of`` lies in ``fan_out``; this name of its module goes with the next version."""

from .fan_out import groups_of

__all__ = ["groups_of"]
