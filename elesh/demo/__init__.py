"""The demo and the simulated trainer: a small network learns handwritten digits under Elesh."""

from .budget import run_budget
from .fleet import local_fleet
from .network import Digits, Split
from .run import Demo, run_demo, run_trainer

__all__ = ["Demo", "Digits", "Split", "local_fleet", "run_budget", "run_demo", "run_trainer"]
