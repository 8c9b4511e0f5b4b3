"""Compiles printed Triton kernels for NVIDIA GPUs that need not be there, and tells what they take of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError, Location
from .triton_launch import function, load_triton
from .triton_printer import Config, TritonKernel

POINTERS = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16"}


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a GPU, as ``ptxas -v`` and the compiler tell.

    Attributes:
        registers: of 32 bits, of one thread.
        spill_stores, spill_loads: bytes of one thread that did not fit into them.
        shared: bytes of shared memory of one program.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int


def compiled(
    printed: TritonKernel, capability: int, *, config: Config | None = None, without: tuple[str, ...] = ()
) -> Any:
    """The kernel compiled for an NVIDIA GPU that need not be there: ``asm["ptx"]``, ``asm["cubin"]``, ``metadata``.

    Args:
        capability: 80 for sm_80.
        config: by default the first of the kernel's.
        without: arguments that are None.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    triton, config = load_triton(), config or printed.configs[0]
    number, wide = POINTERS[printed.storage], POINTERS[printed.dtype]
    types = {"number": number, "wide": wide, "index": "*i64", "size": "i64", "block": "constexpr"}
    signature = {a.name: "constexpr" if a.name in without else types[a.kind] for a in printed.arguments}
    fixed = dict.fromkeys(without) | dict(config.blocks)
    source = triton.compiler.ASTSource(function(printed), signature, constexprs=fixed)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": config.warps})


def resources(
    printed: TritonKernel, capability: int, *, config: Config | None = None, without: tuple[str, ...] = ()
) -> Resources:
    """What the kernel takes of an NVIDIA GPU that need not be there, from the assembler in Triton.

    Raises:
        KernelError: the assembler refuses the kernel.
        MissingExtraError: Triton is not installed.
    """
    made = compiled(printed, capability, config=config, without=without)
    assembler = load_triton().knobs.nvidia.ptxas.path
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
    registers, stores, loads = (int(number[1]) for number in numbers if number is not None)
    return Resources(registers, stores, loads, int(made.metadata.shared))
