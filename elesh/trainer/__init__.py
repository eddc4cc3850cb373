"""The trainer's side: what a PyTorch user adds to a training script.

``Recorder`` finds what can be removed and measures it, ``Session`` talks to the bus off the
training thread, ``Surgeon`` masks, cuts and undoes.
"""

from elesh.trainer.calibration.ranks import merge_ranks
from elesh.trainer.calibration.recorder import MeasuredCheckpoint, Recorder
from elesh.trainer.network.layers import ChannelAxes, teach_layer
from elesh.trainer.session.apply import Evaluation, apply_decision
from elesh.trainer.session.session import Session
from elesh.trainer.surgery.reconstruction.after_cut import InputCovariance, Moments
from elesh.trainer.surgery.surgeon import Surgeon

__all__ = [
    "ChannelAxes",
    "Evaluation",
    "InputCovariance",
    "MeasuredCheckpoint",
    "Moments",
    "Recorder",
    "Session",
    "Surgeon",
    "apply_decision",
    "merge_ranks",
    "teach_layer",
]
