"""How a network is called, which layers it has, and where gates of its units sit."""

from . import kinds as kinds  # they are known before a layer is asked for its axes
