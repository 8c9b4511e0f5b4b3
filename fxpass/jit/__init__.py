"""TorchScript for modules made of parts that want to be compiled in different ways.

A class says by a mark how it becomes TorchScript: by its source (``"script"``), by what it does (``"trace"``), not at
all (``None``), or never (``"unsupported"``).  ``compile`` goes through a module from the leaves up, compiles each part
as its mark says and puts the result in its place, so that what a scripted part decides by its data is still decided
by data within a traced parent::

    @fxpass.jit.compile_mode("script")
    class Readout(nn.Module): ...

    compiled = fxpass.jit.compile(model)

Marks are those of ``e3nn.util.jit``, so e3nn's own classes take part.  A trace is more than recorded: it is run at
other values and other sizes than the traced ones, and refused where it differs from the module.
"""

from .checks import check_trace
from .compiling import compile, script, trace, trace_module
from .inputs import tracing_inputs
from .modes import compile_mode, get_compile_mode

__all__ = [
    "check_trace",
    "compile",
    "compile_mode",
    "get_compile_mode",
    "script",
    "trace",
    "trace_module",
    "tracing_inputs",
]
