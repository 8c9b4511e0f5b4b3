"""fxpass: a graph-rewriting compiler for E(3)-equivariant interatomic potentials."""

from . import jit
from .api import capture, load, optimize, run_passes, verify
from .committee import Committee
from .errors import (
    CaptureError,
    FxpassError,
    Location,
    LoweringError,
    MissingExtraError,
    PackageError,
    PassError,
    PipelineError,
    StructureError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from .ir.cost import Cost, program_cost
from .ir.diff import GraphDiff, diff
from .ir.program import Program, TensorSpec
from .ir.snapshot import Snapshot, snapshot
from .optimized import Optimized
from .passes import Application, Exactness, Outcome, Pass, Refusal
from .report import PassRecord, Report
from .structures import Structure, read_structures
from .training import Trainable, trainable
from .verify.receipt import Receipt

__version__ = "0.1.0"

__all__ = [
    "Application",
    "CaptureError",
    "Committee",
    "Cost",
    "Exactness",
    "FxpassError",
    "GraphDiff",
    "Location",
    "LoweringError",
    "MissingExtraError",
    "Optimized",
    "Outcome",
    "PackageError",
    "Pass",
    "PassError",
    "PassRecord",
    "PipelineError",
    "Program",
    "Receipt",
    "Refusal",
    "Report",
    "Snapshot",
    "Structure",
    "StructureError",
    "TensorSpec",
    "Trainable",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
    "capture",
    "diff",
    "jit",
    "load",
    "optimize",
    "program_cost",
    "read_structures",
    "run_passes",
    "snapshot",
    "trainable",
    "verify",
]
