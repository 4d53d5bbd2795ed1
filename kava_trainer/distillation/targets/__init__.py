"""What is aligned, one class a file: what to capture, how to bring both sides together, which terms come of it."""

from .attention import AttentionTarget
from .base import AlignedStates, Alignment, AlignmentTarget, Sides
from .build import build_target, build_targets, choices_for, no_target
from .hidden import HiddenStateTarget
from .kv import KeyValueTarget
from .relations import RelationsTarget
from .several import SeveralTargets

__all__ = [
    "AlignedStates",
    "Alignment",
    "AlignmentTarget",
    "AttentionTarget",
    "HiddenStateTarget",
    "KeyValueTarget",
    "RelationsTarget",
    "SeveralTargets",
    "Sides",
    "build_target",
    "build_targets",
    "choices_for",
    "no_target",
]
