"""Observers of a run, and searches over it."""

from .bisect import BisectResult, bisect
from .progress import ProgressBar

__all__ = ["BisectResult", "ProgressBar", "bisect"]
