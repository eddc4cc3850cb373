"""What can be removed, and in which order: pure numerics from a checkpoint to a decision."""

from .budget import select_channels
from .decide import analyze
from .explain import Explanation, TargetExplanation, UnitExplanation, explain
from .join import join
from .levels import analyze_level
from .schedule import Allowance, allowance, counted_groups, curve, phase_at
from .sketch import CountMinSketch, ErrorBound, element_keys
from .thresholds import SafetyLevel, Stage, adaptive_threshold, stage_at
from .tracker import ImportanceTracker, Track, channel_metrics

__all__ = [
    "Allowance",
    "CountMinSketch",
    "ErrorBound",
    "Explanation",
    "ImportanceTracker",
    "SafetyLevel",
    "Stage",
    "TargetExplanation",
    "Track",
    "UnitExplanation",
    "adaptive_threshold",
    "allowance",
    "analyze",
    "analyze_level",
    "channel_metrics",
    "counted_groups",
    "curve",
    "element_keys",
    "explain",
    "join",
    "phase_at",
    "select_channels",
    "stage_at",
]
