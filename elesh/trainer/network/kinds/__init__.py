"""Kinds of layers that Elesh teaches itself, as a user teaches others: those whose weights are
computed, or lie together in one tensor, and recurrent layers."""

from . import experts as experts
from . import recurrent as recurrent
from . import weight_norms as weight_norms
