"""For the tests of passes, the shipped ones and yours: programs, inputs, the contract, golden graphs."""

from .contract import PassContract, build_program, derive_values, example_inputs, run_program
from .golden import assert_golden, graph_text

__all__ = [
    "PassContract",
    "assert_golden",
    "build_program",
    "derive_values",
    "example_inputs",
    "graph_text",
    "run_program",
]
