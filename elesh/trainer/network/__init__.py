"""How a network is called, which layers it has, and where gates of its units sit."""

from .kinds import taught as taught  # the kinds are known before a layer is asked for its axes
