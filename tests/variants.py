"""Which variants of a family every run of the tests looks at, and which only a long one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def chosen(names: Iterable[str], *always: str) -> list[Any]:
    """Parameters for all ``names``; those not in ``always`` are marked ``long``."""
    return [pytest.param(name, marks=[] if name in always else [pytest.mark.long]) for name in names]
