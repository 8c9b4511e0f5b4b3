"""Verification of any evaluator: tolerances, physics, and the receipt."""

from __future__ import annotations

from ..structures import Evaluation, Evaluator
from .receipt import Receipt, Row, make_receipt
from .tolerances import parse_budget

__all__ = ["Evaluation", "Evaluator", "Receipt", "Row", "make_receipt", "parse_budget"]
