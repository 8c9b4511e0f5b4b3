"""Kernels are compiled once, whoever asks, and share torch's threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fxpass.errors import KernelError
from fxpass.kernels import build as room
from fxpass.kernels.build import Compiler, build, find_compiler, try_compiler

pytestmark = pytest.mark.once

GXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(GXX is None, reason="no C++ compiler on PATH")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for a compiler")


def answer(number: int) -> str:
    return f'extern "C" int answer() {{ return {number}; }}\n'


def script(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A compiler that writes one line to ``runs`` beside it whenever it compiles."""
    log = tmp_path / "bin" / "runs"
    text = f'case " $* " in *" -c "*) echo "$*" >> {log};; esac\nexec {GXX} "$@"'
    return script(tmp_path / "bin", text)


def runs(compiler: Path) -> int:
    log = compiler.parent / "runs"
    return len(log.read_text().splitlines()) if log.exists() else 0


def found(path: Path, folder: Path) -> Compiler:
    compiler = find_compiler(str(path), folder)
    assert compiler is not None
    return compiler


@needs_compiler
@needs_posix
def test_a_second_build_compiles_nothing(counting: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    compiler = found(counting, cache)
    assert runs(counting) == 1  # the trial
    libraries = build({"one": answer(1), "two": answer(2)}, compiler, cache)
    assert [library.answer() for library in libraries.values()] == [1, 2]
    assert list(libraries) == ["one", "two"]
    assert runs(counting) == 3
    again = build({"two": answer(2)}, compiler, cache)["two"]
    assert again.answer() == 2 and runs(counting) == 3
    assert build({"two": answer(5)}, compiler, cache)["two"].answer() == 5
    assert runs(counting) == 4
    try_compiler.cache_clear()
    assert found(counting, cache) == compiler and runs(counting) == 4  # another process would not try again


@needs_compiler
def test_the_source_lies_beside_the_library(tmp_path: Path) -> None:
    compiler = found(Path(str(GXX)), tmp_path)
    build({"a kernel/../name": answer(3)}, compiler, tmp_path)
    (source,) = tmp_path.glob("a_kernel*.cpp")
    assert source.read_text() == answer(3)
    assert source.with_suffix(".so").is_file()
    assert len(list(tmp_path.iterdir())) == 4  # with those of the trial; nothing temporary


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_library_is_built_again(tmp_path: Path, damage: str) -> None:
    compiler = found(Path(str(GXX)), tmp_path)
    build({"k": answer(7)}, compiler, tmp_path)
    (good,) = tmp_path.glob("k-*.so")
    content = good.read_bytes()
    spoilt = bytearray(content)
    spoilt[len(spoilt) // 2] ^= 0xFF
    other = tmp_path / "other"  # the file that is loaded stays as it is
    other.mkdir()
    library = other / good.name
    library.write_bytes({"truncated": content[:5000], "flipped": bytes(spoilt), "empty": b""}[damage])
    assert build({"k": answer(7)}, compiler, other)["k"].answer() == 7
    rebuilt = library.read_bytes()
    assert rebuilt[-32:] == hashlib.sha256(rebuilt[:-32]).digest()


def build_elsewhere(folder: Path, processes: int) -> None:
    code = f"""
import sys
from pathlib import Path
from fxpass.kernels.build import build, find_compiler
folder = Path({str(folder)!r})
compiler = find_compiler({GXX!r}, folder)
assert build({{"k": {answer(7)!r}}}, compiler, folder)["k"].answer() == 7
"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(processes)]
    assert [process.wait() for process in running] == [0] * processes


@needs_compiler
def test_processes_build_one_kernel_at_once(tmp_path: Path) -> None:
    build_elsewhere(tmp_path, 2)
    assert len(list(tmp_path.glob("k-*"))) == 2 and not list(tmp_path.glob(".*"))


@needs_compiler
def test_threads_build_one_kernel_at_once(tmp_path: Path) -> None:
    compiler = found(Path(str(GXX)), tmp_path)
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build({"k": answer(9)}, compiler, tmp_path)["k"].answer(), range(4)))
    assert built == [9] * 4


@needs_compiler
def test_the_key_holds_flags_version_and_processor(tmp_path: Path) -> None:
    compiler = found(Path(str(GXX)), tmp_path)
    others = [
        compiler,
        Compiler(compiler.path, compiler.version, (*compiler.flags, "-DX"), compiler.processor),
        Compiler(compiler.path, compiler.version + " ", compiler.flags, compiler.processor),
        Compiler(compiler.path, compiler.version, compiler.flags, "another"),
    ]
    for other in others:
        build({"k": answer(1)}, other, tmp_path)
    assert len(list(tmp_path.glob("k-*.so"))) == len(others)


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    with pytest.raises(KernelError, match="did not run"):
        find_compiler("nosuchcompiler")


@needs_posix
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("echo broken >&2; exit 3", "ended with 3:\nbroken"),
        ('case "$*" in *-c*) echo no OpenMP >&2; exit 1;; *) echo fake 1.0;; esac', "no OpenMP"),
    ],
)
def test_a_broken_compiler_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, complaint: str
) -> None:
    path = script(tmp_path / "bin", text)
    with pytest.raises(KernelError, match=complaint):
        find_compiler(str(path), tmp_path / "cache")
    monkeypatch.setenv("PATH", str(path.parent))
    assert find_compiler(folder=tmp_path / "cache") is None


@needs_compiler
def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    compiler = found(Path(str(GXX)), tmp_path)
    with pytest.raises(KernelError, match="kernel wrong does not compile") as caught:
        build({"right": answer(1), "wrong": "int f() { return missing; }"}, compiler, tmp_path)
    assert "missing" in str(caught.value)
    kept = caught.value.where.source
    assert kept is not None and Path(kept).read_text() == "int f() { return missing; }"
    assert not list(tmp_path.glob("wrong-*.so"))


@needs_compiler
def test_a_folder_that_cannot_be_written_to_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere, cache = tmp_path / "tmp", tmp_path / "cache"
    elsewhere.mkdir()
    monkeypatch.setattr(room.tempfile, "tempdir", str(elsewhere))
    compiler = found(Path(str(GXX)), cache)
    build({"old": answer(1)}, compiler, cache)
    cache.chmod(0o500)
    monkeypatch.setattr(room, "_writable", lambda folder: False)  # root may write wherever it likes
    before = set(cache.iterdir())
    libraries = build({"old": answer(1), "new": answer(2)}, compiler, cache)
    cache.chmod(0o700)
    assert [library.answer() for library in libraries.values()] == [1, 2]
    assert set(cache.iterdir()) == before
    assert {path.name.split("-")[0] for path in elsewhere.glob("*/*")} == {"new"}


def test_the_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert room.cache_folder() == tmp_path / "fxpass" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert room.cache_folder() == tmp_path / "home" / ".cache" / "fxpass" / "kernels"
    monkeypatch.setattr(room.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert room.cache_folder() == tmp_path / "local" / "fxpass" / "kernels"


@needs_posix
def test_a_folder_that_others_can_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room.tempfile, "tempdir", str(tmp_path))
    mine = room.temporary_folder()
    assert mine.parent == tmp_path and room.temporary_folder() == mine
    mine.chmod(0o777)
    assert room.temporary_folder() != mine


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of loaded libraries")
def test_kernels_share_the_threads_of_torch(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from fxpass.kernels.build import find_compiler
assert find_compiler({GXX!r}, Path({str(tmp_path)!r})) is not None
lines = Path("/proc/self/maps").read_text().splitlines()
names = {{line.split()[-1] for line in lines}}
assert any("fxpass_trial" in name for name in names)
print(*sorted(name for name in names if "omp" in name.rsplit("/", 1)[-1].lower()), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runtimes = done.stdout.split()
    assert len(runtimes) == 1 and "torch" in runtimes[0], runtimes


@needs_compiler
def test_arguments_reach_a_kernel(tmp_path: Path) -> None:
    source = """#include <cstdint>
extern "C" void twice(const double* x, double* y, int64_t n, int threads) {
    #pragma omp parallel for num_threads(threads) if (n > 1)
    for (int64_t i = 0; i < n; i++) y[i] = 2 * x[i];
}
"""
    library = build({"twice": source}, found(Path(str(GXX)), tmp_path), tmp_path)["twice"]
    x, y = (ctypes.c_double * 3)(1, 2, 3), (ctypes.c_double * 3)()
    library.twice(x, y, ctypes.c_int64(3), 2)
    assert list(y) == [2, 4, 6]
