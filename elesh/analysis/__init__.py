"""What can be removed, and in which order: pure numerics from a checkpoint to a decision."""

from elesh.analysis.decision.decide import analyze
from elesh.analysis.decision.explain import Explanation, TargetExplanation, UnitExplanation, explain
from elesh.analysis.decision.join import JoinContext, join, joined
from elesh.analysis.importance.tracker import ImportanceTracker, Track, channel_metrics
from elesh.analysis.levels.analyze_level import LevelDraft, analyze_level, draft_level
from elesh.analysis.levels.units import select_channels
from elesh.analysis.selection.schedule import (
    Allowance,
    SafetyLevel,
    Stage,
    adaptive_threshold,
    allowance,
    counted_groups,
    curve,
    phase_at,
    stage_at,
)
from elesh.analysis.sketch.count_min import CountMinSketch, ErrorBound, element_keys

__all__ = [
    "Allowance",
    "CountMinSketch",
    "ErrorBound",
    "JoinContext",
    "Explanation",
    "ImportanceTracker",
    "LevelDraft",
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
    "draft_level",
    "element_keys",
    "explain",
    "join",
    "joined",
    "phase_at",
    "select_channels",
    "stage_at",
]
