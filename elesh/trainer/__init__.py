"""The trainer's side: what a PyTorch user adds to a training script.

``Recorder`` finds what can be removed and measures it, ``Session`` talks to the bus off the
training thread, ``Surgeon`` masks, cuts and undoes.
"""

from .apply import Evaluation, apply_decision
from .ranks import merge_ranks
from .recorder import Recorder
from .redistribute import Moments
from .session import Session
from .surgeon import Surgeon

__all__ = [
    "Evaluation",
    "Moments",
    "Recorder",
    "Session",
    "Surgeon",
    "apply_decision",
    "merge_ranks",
]
