"""``fxpass optimize`` and ``fxpass verify``: make a replacement, and hold one against its original."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import api
from ..optimized import Optimized
from ..package import check_new
from ..render.terminal import receipt_table, report_view
from ..runner import Observer
from . import options
from .answer import Answer
from .options import Commands

OPTIMIZE = """
fxpass optimize example:small -o small.fxp
fxpass optimize example:small -o small.pt --target torchscript --passes exact --no-verify
"""

VERIFY = """
fxpass optimize example:small -o small.fxp --no-verify
fxpass verify small.fxp --against example:small
"""


def add_to(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add(
        "optimize",
        optimize,
        "compile a potential to a verified drop-in replacement",
        *options.optimizing_options("-o", "--output"),
        options.passes_option(),
        more="The result is compared with the original in float64; one outside its tolerance is not written.",
        examples=OPTIMIZE,
    )
    parser.add_argument("--dump", metavar="DIR", help="new folder for every intermediate graph and the report")

    parser = commands.add(
        "verify",
        verify,
        "compare a result with its original",
        options.verification_options("structures to compare on besides the built-in ones"),
        more="Energy, forces and stress against the original in float64, symmetries, derivatives. Exits with 1 where "
        "something is outside its tolerance.",
        examples=VERIFY,
    )
    parser.add_argument("result", metavar="OUT", help="what fxpass optimize wrote")
    parser.add_argument("--against", metavar="MODEL", required=True, help=options.MODEL_HELP)


def optimize(arguments: argparse.Namespace) -> Answer:
    output = Path(arguments.output)
    check_new(output, overwrite=arguments.overwrite)
    if arguments.dump is not None:
        check_new(Path(arguments.dump), overwrite=False)
    result = optimized(arguments, arguments.passes, arguments.budget, dump=arguments.dump)
    result.save(output, overwrite=arguments.overwrite)
    size = output.stat().st_size
    return Answer(
        {**result.report.to_json(), "output": str(output), "bytes": size},
        (report_view(result.report), f"{output}: {size / 1e3:,.0f} kB"),
    )


def optimized(
    arguments: argparse.Namespace,
    passes: str,
    budget: str | None,
    *,
    observers: Sequence[Observer] = (),
    dump: str | None = None,
) -> Optimized:
    """What ``passes`` make of the model of a command with ``options.optimizing_options``."""
    structures = options.find_structures(arguments.structures)
    with options.progress(stages=5, passes=passes) as bar:
        return api.optimize(
            options.find_model(arguments.model),
            passes,
            example=structures,
            calibration=options.find_structures(arguments.calibration) if arguments.calibration else None,
            target=arguments.target,
            budget=budget,
            verify=not arguments.no_verify,
            dump=dump,
            observers=[bar, *observers],
            progress=bar.stage,
        )


def verify(arguments: argparse.Namespace) -> Answer:
    structures = options.find_structures(arguments.structures)
    result = api.load(arguments.result)
    original = options.find_model(arguments.against)
    with options.progress(stages=1) as bar:
        bar.stage("verify")
        receipt = api.verify(result, original, example=structures, budget=arguments.budget)
    data = receipt.to_json()
    return Answer(data, (receipt_table(data), receipt.summary()), code=0 if receipt.passed else 1)
