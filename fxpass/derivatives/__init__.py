"""Derivatives of an optimised model, as a product: by positions, strain and external inputs, to third order."""

from __future__ import annotations

from .derivatives import EV_PER_CUBIC_ANGSTROM, Derivatives
from .first import EdgeForces

__all__ = ["EV_PER_CUBIC_ANGSTROM", "Derivatives", "EdgeForces"]
