"""The demo and the simulated trainer: a real network learns real handwritten digits under Elesh."""

from .run import Demo, run_demo, run_trainer

__all__ = ["Demo", "run_demo", "run_trainer"]
