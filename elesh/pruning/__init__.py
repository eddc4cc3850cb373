"""What a training script calls: prune at once, prune while training, save and load what is left."""

from .saved import load, save

__all__ = ["load", "save"]
