"""Any module as a program: no family, no atoms, no energy; arguments as an example gives them.

``fxpass.optimize(module, example_inputs=...)`` comes here.  The first dimension of every tensor is a size that may
change, unless the module itself does not take another one; ``dynamic`` names others.
"""

from .example import Example, read_example
from .judge import FunctionJudge
from .optimized import FAMILY, OptimizedFunction, lower_function
from .signature import Signature

__all__ = ["FAMILY", "Example", "FunctionJudge", "OptimizedFunction", "Signature", "lower_function", "read_example"]
