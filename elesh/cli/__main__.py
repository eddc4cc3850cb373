"""``python -m elesh.cli``: the same as the command ``elesh``."""

from . import main

main()
