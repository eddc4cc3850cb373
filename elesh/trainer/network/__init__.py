"""How a network is called, which layers it has, and where gates of its units sit."""
