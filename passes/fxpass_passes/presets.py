"""Presets: pipelines by name, in their text form."""

_ENERGY = "fold-constants,specialize-species,specialize-heads,dead-irreps,common-subexpressions,dead-code"
_FORCES = "differentiate,fold-constants,common-subexpressions,dead-code"
_TABLES = "preserve-sparsity,tabulate"

#: folds that move nothing but rounding; what the bars of the `exact` preset are measured on
EXACT = f"{_ENERGY},{_FORCES}"

#: what `optimize` runs unless told otherwise: exact passes, certified tables, edges in one order and within the cutoff
DEFAULT = f"{_ENERGY},{_TABLES},legalize-custom-ops,{_FORCES}"

#: mixed precision on top, within the budget that the user gives
FAST = f"{_ENERGY},{_TABLES},pin-precision{{compute=float16}},legalize-custom-ops,guard-fusion,{_FORCES}"

#: a pure ATen result
PORTABLE = f"{EXACT},legalize,fold-constants,common-subexpressions,dead-code"
