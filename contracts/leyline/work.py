"""The parts of a checkpoint lie in ``streams``; this module's name goes with the next version."""

from .streams import AnalysisItem, ItemResult, JoinItem

__all__ = ["AnalysisItem", "ItemResult", "JoinItem"]
