"""Presets: pipelines by name, in their text form."""

#: folds that move nothing but rounding; what the bars of the `exact` preset are measured on
EXACT = (
    "fold-constants,specialize-species,specialize-heads,dead-irreps,common-subexpressions,dead-code,"
    "differentiate,fold-constants,common-subexpressions,dead-code"
)

#: what `optimize` runs unless told otherwise
DEFAULT = EXACT

#: a pure ATen result
PORTABLE = f"{EXACT},legalize,fold-constants,common-subexpressions,dead-code"
