"""Kinds of layers that Elesh teaches itself, as a user teaches others: those whose weights are
computed, or lie together in one tensor, recurrent layers, and linear layers of people's own."""

from . import experts as experts
from . import hand_written as hand_written
from . import recurrent as recurrent
from . import weight_norms as weight_norms
