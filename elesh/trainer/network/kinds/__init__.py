"""Kinds of layers that Elesh adds to those it knows, in the same way as a user does: layers with
computed weights or with several weights in one tensor, recurrent layers, and people's own linear
layers."""

from . import experts as experts
from . import hand_written as hand_written
from . import recurrent as recurrent
from . import weight_norms as weight_norms
