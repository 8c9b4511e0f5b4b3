"""Compiles and launches printed Triton kernels; Triton is imported when the first one is asked for."""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.irreps import dim
from ..errors import KernelError, Location, MissingExtraError
from .triton_printer import TritonConvolution

POINTERS = {"float32": "*fp32", "float64": "*fp64"}
INDICES = ("species", "sender", "receiver", "order")
SIZES = ("size", "atoms")


@dataclass(frozen=True)
class Resources:
    """What one thread takes of a GPU, as ``ptxas -v`` tells.

    Attributes:
        registers: of 32 bits.
        spill_stores, spill_loads: bytes that did not fit into them.
    """

    registers: int
    spill_stores: int
    spill_loads: int


def function(printed: TritonConvolution) -> Any:
    """The kernel as Triton's ``JITFunction``; compiled at its first launch, and kept by Triton after that.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    triton = _triton()
    place = f"<fxpass {printed.name}>"
    # Triton reads the source of what it compiles, and so do tracebacks
    linecache.cache[place] = (len(printed.source), None, printed.source.splitlines(keepends=True), place)
    names: dict[str, Any] = {"triton": triton, "tl": triton.language, "__name__": __name__}
    exec(compile(printed.source, place, "exec"), names)
    return names[printed.name]


def bind(printed: TritonConvolution) -> Callable[..., Any]:
    """The kernel as a function with the arguments of the op less its texts, as ``ConvolutionKernel.bind`` gives it.

    It takes contiguous tensors of the kernel's dtype (indices int64) on one device, and ``coefficients`` as
    ``convolution.pack`` makes them.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    kernel, tp = function(printed), printed.kernel.product
    columns, needs = dim(tp.irreps_out), printed.kernel.needs

    def forward(
        x: Tensor,
        y: Tensor,
        radial: Tensor,
        species: Tensor | None,
        coefficients: Tensor | None,
        sender: Tensor,
        receiver: Tensor,
        order: Tensor,
        size: int,
    ) -> Tensor:
        out = x.new_empty((size, columns))
        if size:
            kernel[size,](x, y, radial, species, coefficients, sender, order, out, size, num_warps=printed.warps)
        return out

    def gradient(
        x: Tensor,
        y: Tensor,
        g: Tensor,
        radial: Tensor,
        species: Tensor | None,
        coefficients: Tensor | None,
        sender: Tensor,
        receiver: Tensor,
        order: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        makers = (torch.empty_like, torch.empty_like, torch.zeros_like)  # zeros: a weight may belong to no path
        slots = zip(makers, (x, y, radial), needs, strict=True)
        made = [make(t) if needed else x.new_empty(0) for make, t, needed in slots]
        atoms = x.shape[0]
        if atoms:
            operands = (x, y, g, radial, species, coefficients, receiver, order, *made, atoms)
            kernel[atoms,](*operands, num_warps=printed.warps)
        return made[0], made[1], made[2]

    return gradient if printed.kernel.gradient else forward


def compiled(printed: TritonConvolution, capability: int, *, species: bool = False) -> Any:
    """The kernel compiled for an NVIDIA GPU that need not be there: ``asm["ptx"]``, ``asm["cubin"]``, ``metadata``.

    Args:
        capability: 80 for sm_80.
        species: each edge has the number of its table.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    triton = _triton()
    absent = [] if printed.kernel.grid is not None else ["coefficients"]
    absent += [] if species else ["species"]
    number = POINTERS[printed.kernel.dtype]
    types: Mapping[str, str] = {
        name: "constexpr" if name in absent else "*i64" if name in INDICES else "i64" if name in SIZES else number
        for name in printed.arguments
    }
    source = triton.compiler.ASTSource(function(printed), types, constexprs=dict.fromkeys(absent))
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": printed.warps})


def resources(printed: TritonConvolution, capability: int, *, species: bool = False) -> Resources:
    """Registers and spills of the kernel on an NVIDIA GPU that need not be there, from the assembler in Triton.

    Raises:
        KernelError: the assembler refuses the kernel.
        MissingExtraError: Triton is not installed.
    """
    made = compiled(printed, capability, species=species)
    assembler = _triton().knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(made.asm["ptx"])
        # the architecture as the text names it: sm_90a has instructions that sm_90 has not
        (target,) = re.findall(r"^\.target (\w+)", made.asm["ptx"], re.MULTILINE)
        command = [assembler, "-v", f"--gpu-name={target}", str(text), "-o", str(text.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"ptxas refuses {printed.name}: {done.stderr.strip()}", where=Location(source=assembler))
    numbers = [re.search(rf"(\d+) {what}", done.stderr) for what in ("registers", "bytes spill st", "bytes spill lo")]
    if None in numbers:
        raise KernelError(f"ptxas does not tell what {printed.name} takes: {done.stderr.strip()}")
    return Resources(*(int(number[1]) for number in numbers if number is not None))


def _triton() -> Any:
    try:
        import triton
        import triton.backends.compiler
        import triton.compiler
        import triton.language
    except ImportError as error:
        raise MissingExtraError("Triton is not installed", hint='pip install "fxpass[triton]"') from error
    return triton
