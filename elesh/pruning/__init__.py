"""What a training script calls: prune at once, prune while training, save, load."""

from .at_once import prune
from .attached import Pruning, attach
from .report import PruningReport
from .saved import load, save

__all__ = ["Pruning", "PruningReport", "attach", "load", "prune", "save"]
