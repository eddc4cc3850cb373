"""The old module name for the parts of a checkpoint (now in ``streams``); it goes with the next
version."""

from .streams import AnalysisItem, ItemResult, JoinItem

__all__ = ["AnalysisItem", "ItemResult", "JoinItem"]
