"""Chooses how Triton kernels are launched by measuring, and keeps what it chose in a file for each kind of device."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .build import cache_folder
from .triton_printer import Config, TritonKernel

WARM_UP, CALLS = 2, 7
#: programs for each multiprocessor; a choice made for fewer would be one for an idle device
ENOUGH = 4


def seconds(call: Callable[[], None]) -> float:
    """Median time of ``call`` on the current stream of the current CUDA device."""
    for _ in range(WARM_UP):
        call()
    taken = []
    for _ in range(CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return median(taken)


@dataclass(frozen=True)
class Device:
    """What a choice depends on.

    Attributes:
        name: of the kind of device, as its driver tells.
        processors: that run programs at once.
    """

    name: str
    processors: int


@cache
def cuda_device(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    return Device(facts.name, facts.multi_processor_count)


@dataclass
class Tuner:
    """Measures every configuration of a kernel at its first large call on a kind of device.

    Kernels write what they make and read nothing of it, so that they can be run again on the same operands.  The file
    ``triton-DEVICE.json`` holds for each kernel, by its name, which is made from its text, the configuration and the
    seconds that it took; what is not one of the kernel's configurations is measured anew.

    Attributes:
        folder: of the files, by default ``build.cache_folder()``; where it cannot be written to, choices last as
            long as this object.
        measure: seconds of a call.
        describe: what a device is.
    """

    folder: Path | None = None
    measure: Callable[[Callable[[], None]], float] = seconds
    describe: Callable[[torch.device], Device] = cuda_device
    _chosen: dict[tuple[str, str], Config] = field(default_factory=dict, repr=False)

    def choose(
        self, printed: TritonKernel, device: torch.device, programs: int, start: Callable[[Config], None]
    ) -> Config:
        """The configuration for a call with so many programs, which ``start`` runs with any of them."""
        about = self.describe(device)
        key = (about.name, printed.name)
        if key not in self._chosen:
            stored = _read(self._file(about)).get(printed.name, {})
            kept = [c for c in printed.configs if to_json(c) == stored.get("config")]
            if not kept:
                if programs < ENOUGH * about.processors or _capturing(device):
                    return printed.configs[0]
                kept = [self._search(printed, about, start)]
            self._chosen[key] = kept[0]
        return self._chosen[key]

    def _search(self, printed: TritonKernel, about: Device, start: Callable[[Config], None]) -> Config:
        taken: dict[Config, float] = {}
        for config in printed.configs:
            try:
                taken[config] = self.measure(partial(start, config))
            except _too_large():
                continue
        best = min(taken, key=taken.__getitem__, default=printed.configs[0])
        if taken:
            _write(self._file(about), printed.name, {"config": to_json(best), "seconds": taken[best]})
        return best

    def _file(self, about: Device) -> Path:
        folder = cache_folder() if self.folder is None else self.folder
        return folder / f"triton-{re.sub(r'[^A-Za-z0-9]+', '-', about.name)}.json"


def to_json(config: Config) -> dict[str, int]:
    return {"warps": config.warps, **dict(config.blocks)}


def _too_large() -> type[Exception]:
    """What Triton raises where a configuration takes more shared memory or registers than the device has."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _capturing(device: torch.device) -> bool:
    """A CUDA graph is being recorded, and what is measured would become part of it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, name: str, row: dict[str, Any]) -> None:
    """Adds a row and renames, so that others see a whole file; a row that another process wrote meanwhile may go."""
    text = json.dumps({**_read(file), name: row}, indent=1, sort_keys=True)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=file.parent) as private:
            made = Path(private) / file.name
            made.write_text(text + "\n", encoding="utf-8")
            os.replace(made, file)
    except OSError:
        return  # measured again next time
