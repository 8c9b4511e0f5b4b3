"""Compiles C++ kernels to shared libraries and keeps them: parallel, content-addressed, safe between processes.

A library is found by the digest of all that decides what it holds: source, compiler, flags and processor.  So
nothing in the cache is ever stale, and a home folder shared by different machines is safe with ``-march=native``.
Each file ends with its own digest, because loading a truncated library kills the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # kernels resolve OpenMP in the runtime that it loads

from ..errors import KernelError, Location

#: sums stay in the order they are written in; only multiply-adds are contracted
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-Wno-psabi",
)
NATIVE = (("-march=native",), ("-mcpu=native",), ())  # Clang knows only the second one on some processors
UNRESOLVED = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()  # Linux needs no leave for it
SECONDS = 300  # for one call of the compiler
TRIAL = """#include <cstdint>
extern "C" int64_t fxpass_trial(int64_t n, int threads) {
    int64_t total = 0;
    #pragma omp parallel for num_threads(threads) reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += i;
    return total;
}
"""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that has built, loaded and run an OpenMP kernel in this process.

    Attributes:
        path: of the executable.
        version: first line of what it says to ``--version``.
        flags: with which it compiles.
        processor: digest of the macros it defines with ``flags``, which tell what the processor can execute.
    """

    path: str
    version: str
    flags: tuple[str, ...]
    processor: str


@dataclass(frozen=True)
class Bound:
    """The functions of a built library."""

    library: ctypes.CDLL

    def __deepcopy__(self, memo: Any) -> Bound:
        return self  # copies of a model share its code


def find_compiler(path: str | None = None, folder: Path | None = None) -> Compiler | None:
    """The first of g++, c++ and clang++ on PATH that builds kernels, or None; ``path`` names the only one to try.

    The trial kernel is kept in ``folder`` as any other, so a later process does not compile it again.

    Raises:
        KernelError: the compiler named by ``path`` does not build kernels.
    """
    if path is not None:
        return try_compiler(shutil.which(path) or path, folder)
    for name in ("g++", "c++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            try:
                return try_compiler(found, folder)
            except KernelError:
                continue
    return None


@cache
def try_compiler(path: str, folder: Path | None = None) -> Compiler:
    """The compiler at ``path``, once it has built, loaded and run a kernel on two threads.

    Raises:
        KernelError: with what the compiler said when the last set of flags failed.
    """
    version = (_run([path, "--version"], "trial").splitlines() or [""])[0]
    failure = KernelError(f"{path} compiles for no processor", where=Location(source=path))
    for native in NATIVE:
        flags = (*FLAGS, *native)
        try:
            macros = _run([path, *flags, "-dM", "-E", "-x", "c++", os.devnull], "trial")
            digest = hashlib.sha256("\n".join(sorted(macros.splitlines())).encode()).hexdigest()
            compiler = Compiler(path, version, flags, digest)
            trial = build({"fxpass_trial": TRIAL}, compiler, folder)["fxpass_trial"].fxpass_trial
        except KernelError as error:
            failure = error
            continue
        trial.argtypes, trial.restype = (ctypes.c_int64, ctypes.c_int), ctypes.c_int64
        if trial(1000, 2) == 499500:
            return compiler
        failure = KernelError(f"{path} builds kernels that compute wrong numbers", where=Location(source=path))
    raise failure


def build(
    sources: Mapping[str, str], compiler: Compiler, folder: Path | None = None, jobs: int | None = None
) -> dict[str, ctypes.CDLL]:
    """Compile what the cache does not hold, and load it all.

    Libraries resolve OpenMP in the runtime that torch has loaded, so that both share one pool of threads. The
    readable source lies beside each library.

    Args:
        sources: complete C++ text by name of kernel.
        folder: of the cache, by default ``cache_folder()``; where it cannot be written to, a temporary one is used.
        jobs: compilers at a time, by default one for each processor that this process may use.

    Raises:
        KernelError: a kernel does not compile or load; its source stays in the folder.
    """
    folder = cache_folder() if folder is None else folder
    jobs = jobs or _processors()
    with ThreadPoolExecutor(max_workers=max(1, min(jobs, len(sources)))) as pool:
        built = pool.map(lambda name: _library(name, sources[name], compiler, folder), sources)
        return dict(zip(sources, built, strict=True))


def cache_folder() -> Path:
    """Where libraries are kept: ``fxpass/kernels`` in the platform's folder for caches, or a temporary one."""
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fxpass" / "kernels"
    except RuntimeError:  # a container's user may have no home
        return temporary_folder()


def _library(name: str, source: str, compiler: Compiler, folder: Path) -> ctypes.CDLL:
    parts = (source, compiler.version, *compiler.flags, compiler.processor)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    stem = f"{''.join(c if c.isalnum() else '_' for c in name[:60])}-{digest[:32]}"
    library = folder / f"{stem}.so"
    if not _intact(library) and not _writable(folder):
        library = temporary_folder() / library.name
    try:
        if not _intact(library):
            _compile(name, source, compiler, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        where = Location(source=str(library.with_suffix(".cpp")))
        raise KernelError(f"The kernel {name} cannot be kept or loaded: {error}", where=where) from error


def _compile(name: str, source: str, compiler: Compiler, library: Path) -> None:
    """Write, compile and link under names of this call's own, then rename: others see a whole file or none."""
    readable = library.with_suffix(".cpp")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=library.parent) as private:
        text, made, linked = (Path(private) / f"kernel.{kind}" for kind in ("cpp", "o", "so"))
        text.write_text(source, encoding="utf-8")
        os.replace(text, readable)
        _run([compiler.path, *compiler.flags, "-c", str(readable), "-o", str(made)], name, readable)
        # linked without -fopenmp: a second OpenMP runtime would keep a second pool of threads
        _run([compiler.path, "-shared", *UNRESOLVED, str(made), "-o", str(linked)], name, readable)
        with linked.open("ab") as file:
            file.write(hashlib.sha256(linked.read_bytes()).digest())
        os.replace(linked, library)


def _run(command: Sequence[str], name: str, readable: Path | None = None) -> str:
    where = Location(source=str(readable) if readable else command[0])
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"The compiler of kernel {name} did not run: {error}", where=where) from error
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).splitlines()[:8])
        what = f"The kernel {name} does not compile; {command[0]} ended with {done.returncode}:\n{said}"
        raise KernelError(what, where=where)
    return done.stdout


def _intact(library: Path) -> bool:
    """Whether a file ends with the digest of the rest."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def temporary_folder() -> Path:
    """A folder for libraries where temporary files go, which no other user can have put files into."""
    owner = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"fxpass-kernels-{owner}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if folder.is_symlink() or facts.st_uid != owner or facts.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="fxpass-kernels-"))
    return folder


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
