"""Rewriting: rules as pattern, check and replace; what a pass may remove, merge or compute ahead of time."""

from .driver import (
    RewriteOutcome,
    RuleStatistics,
    apply_rules,
    erase_unused,
    escapes,
    is_pure,
    shares_memory,
)
from .pattern import Lit, Match, OneOf, Op, PartialMatch, Shared, Var, arguments, match
from .rule import Builder, Refused, Rule, refuse

__all__ = [
    "Builder",
    "Lit",
    "Match",
    "OneOf",
    "Op",
    "PartialMatch",
    "Refused",
    "RewriteOutcome",
    "Rule",
    "RuleStatistics",
    "Shared",
    "Var",
    "apply_rules",
    "arguments",
    "erase_unused",
    "escapes",
    "is_pure",
    "match",
    "refuse",
    "shares_memory",
]
