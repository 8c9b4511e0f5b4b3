"""What users get wrong: one paragraph that says what and what to try, an exit code, and nothing overwritten."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpass
from fxpass import package
from fxpass.api import capture
from fxpass.cli import main
from fxpass.models import WEIGHTS, small_potential

pytestmark = pytest.mark.once

MODEL = "example:small"
Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command that must fail, in a folder of its own in which it must change nothing; returns its message."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 2, says: tuple[str, ...]) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert main(words) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert contents(tmp_path) == before
        return paragraph(err, says)

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file in a folder with its bytes, and every folder in it."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def paragraph(err: str, says: tuple[str, ...]) -> str:
    """The error at the end of what was written to standard error: one paragraph without a traceback."""
    assert "Traceback" not in err
    message = err.rpartition("error: ")[2]
    assert "\n\n" not in message.strip()
    for text in says:
        assert text in message, message
    assert "Try: " in message or "^" in message or ".xyz" in message  # carets and file places say it themselves
    return message


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Installs a package that registers one pass: a module and its metadata in a folder on the path."""
    folder = tmp_path_factory.mktemp("plugin")
    monkeypatch.syspath_prepend(folder)

    def install(name: str, source: str) -> None:
        module = name.replace("-", "_")
        metadata = folder / f"acme_{module}-1.2.dist-info"
        metadata.mkdir()
        (folder / f"{module}.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[fxpass.passes]\n{name} = {module}:Subject\n")

    return install


PASS = """
from dataclasses import dataclass
from fxpass import Outcome, Pass

@dataclass(frozen=True)
class Subject(Pass):
    name = "{name}"

    def apply(self, program):
        {body}
"""


# --- models


@pytest.mark.parametrize(
    "model", [torch.zeros(3), None, {"weights": torch.zeros(3)}, 7], ids=["tensor", "none", "dict", "number"]
)
def test_not_a_model(model: Any) -> None:
    with pytest.raises(fxpass.UsageError, match=f"{type(model).__name__} is not a model") as found:
        fxpass.optimize(model)
    assert found.value.hint is not None


@pytest.mark.parametrize(
    "model", [torch.nn.Linear(2, 2), torch.nn.Transformer(8, 2, 1, 1, batch_first=True)], ids=["linear", "transformer"]
)
def test_an_unsupported_module(model: torch.nn.Module) -> None:
    with pytest.raises(fxpass.UnsupportedModelError) as found:
        fxpass.optimize(model)
    assert found.value.where.module_path == "(model)"
    assert type(model).__qualname__ in str(found.value.where.source)
    assert "register a frontend" in str(found.value.hint)


@pytest.mark.mace
def test_an_unsupported_variant_of_a_family() -> None:
    """Refused by the class of the model, before any of it is looked at, so an empty one will do."""
    from mace.modules import AtomicDipolesMACE

    model = AtomicDipolesMACE.__new__(AtomicDipolesMACE)
    torch.nn.Module.__init__(model)
    with pytest.raises(fxpass.UnsupportedModelError, match="AtomicDipolesMACE") as found:
        fxpass.optimize(model)
    assert "ScaleShiftMACE" in str(found.value.hint)


def write_text(path: Path) -> None:
    path.write_text("not a model")


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_broken_archive(path: Path) -> None:
    """An archive whose end is there, and says that its list of members is where it is not."""
    path.write_bytes(b"not a list" + b"PK\x05\x06\0\0\0\0\1\0\1\0\x0a\0\0\0\0\0\0\0\0\0")


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1.0]}))


def write_checkpoint_of_a_dict(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def write_half_a_potential(path: Path) -> None:
    path.write_bytes(WEIGHTS.read_bytes()[: WEIGHTS.stat().st_size // 2])


@pytest.mark.parametrize(
    "write",
    [write_text, write_nothing, write_broken_archive, write_pickle, write_checkpoint_of_a_dict, write_half_a_potential],
)
def test_a_file_that_is_no_checkpoint(refused: Refused, tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "some.model")
    refused("optimize", "some.model", "-o", "out.fxp", says=("some.model", "mace", "equivariant"))
    refused("inspect", "some.model", says=("some.model",))


def test_a_file_that_is_missing(refused: Refused) -> None:
    refused("optimize", "gone.model", "-o", "out.fxp", says=("there is no file gone.model",))
    refused("verify", "gone.fxp", "--against", MODEL, says=("there is no file gone.fxp",))


def mace_checkpoint(path: Path, pickled: bytes) -> None:
    """An archive like ``torch.save`` writes, of which the pickle names a module of MACE."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/version", "3\n")


@pytest.mark.mace
@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02cmace.modules.models\nNoSuchModel\nq\x00.", "NoSuchModel"),
        (b"\x80\x02cmace.modules.no_such_module\nMACE\nq\x00.", "no_such_module"),
        (b"\x80\x02cmace.modules.models\nMACE\n", "cannot be loaded"),
        (b"\x80\x02X\x0c\x00\x00\x00mace.modulesq\x00.", "str, not a MACE model"),
    ],
    ids=["class", "module", "truncated", "other"],
)
def test_a_checkpoint_that_cannot_be_unpickled(refused: Refused, tmp_path: Path, pickled: bytes, reason: str) -> None:
    mace_checkpoint(tmp_path / "some.model", pickled)
    refused("optimize", "some.model", "-o", "out.fxp", says=("some.model", reason))


def write_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def write_altered(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["program.json"] = members["program.json"].replace(b"silu", b"relu")
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)


# --- passes


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        ("dead-cod", ("'dead-cod'", "did you mean 'dead-code'?", "common-subexpressions")),
        ("exact,defualt", ("'defualt'", "did you mean 'default'?")),
        ("specialize-heads{haed=0}", ("'haed'", "did you mean 'head'?")),
        ("dead-code{", ("the name of an option", "dead-code{", "^")),
        ("", ("empty",)),
    ],
)
def test_an_unknown_pass_or_option(refused: Refused, pipeline: str, says: tuple[str, ...]) -> None:
    for command in (["diff", MODEL], ["optimize", MODEL, "-o", "out.fxp"], ["bench", MODEL]):
        refused(*command, "-p", pipeline, says=says)


def test_an_unknown_pass_to_explain(refused: Refused) -> None:
    refused("explain", "dead-cod", says=("did you mean 'dead-code'?",))


def test_an_unknown_target(refused: Refused) -> None:
    refused("optimize", MODEL, "-o", "out.fxp", "-t", "torchscrip", says=("did you mean 'torchscript'?", "eager"))


@pytest.mark.parametrize("budget", ["much", "-1", "1 kcal/mol"])
def test_a_budget_that_is_none(refused: Refused, budget: str) -> None:
    refused("optimize", MODEL, "-o", "out.fxp", f"--budget={budget}", says=(budget, "1 meV/A"))


@pytest.mark.parametrize(
    ("name", "body", "complaint"),
    [
        ("returns-nothing", "return None", "instead of an Outcome"),
        ("breaks-the-graph", "program.graph.output_node().args = (7,); return Outcome(program, True)", "broken graph"),
        ("drops-an-output", "return Outcome(__import__('dataclasses').replace(program, outputs=()), True)", "outputs"),
        ("crashes", "raise ZeroDivisionError('by zero')", "ZeroDivisionError: by zero"),
    ],
)
def test_a_pass_that_breaks_its_promise(
    captured: fxpass.Program, plugin: Callable[[str, str], None], name: str, body: str, complaint: str
) -> None:
    plugin(name, PASS.format(name=name, body=body))
    with pytest.raises(fxpass.PassError) as found:
        fxpass.run_passes(captured, ["dead-code", name])
    assert found.value.where.pass_name == name
    paragraph(f"error: {found.value}", (f"'{name}'", complaint, "passes that ran before: dead-code"))


@pytest.fixture(scope="module")
def captured() -> fxpass.Program:
    return capture(small_potential())


@pytest.mark.slow
def test_a_pass_that_changes_the_result(refused: Refused, plugin: Callable[[str, str], None]) -> None:
    """Found by the receipt, named by bisecting, and nothing is written."""
    body = (
        "[setattr(n, 'target', relu) for n in program.graph.nodes if n.target is silu]; return Outcome(program, True)"
    )
    source = PASS.format(name="wrong-function", body=body)
    ops = "import torch\nrelu, silu = torch.ops.aten.relu.default, torch.ops.aten.silu.default\n"
    plugin("wrong-function", ops + source)
    words = ["optimize", MODEL, "-o", "out.fxp", "-p", "dead-code,wrong-function,differentiate"]
    refused(*words, code=1, says=("the pass wrong-function is to blame", "FAILED", "energy of"))


def test_a_plugin_that_cannot_be_imported(
    refused: Refused, plugin: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the way of nobody who does not use it."""
    plugin("broken-plugin", "import no_such_package")
    says = ("'broken-plugin'", "acme-broken-plugin 1.2", "no_such_package")
    refused("explain", "broken-plugin", says=says)
    refused("diff", MODEL, "-p", "broken-plugin", says=says)

    assert main(["explain", "dead-code"]) == 0
    assert main(["passes"]) == 0
    listed = capsys.readouterr().out
    assert "broken: " in listed
    assert main(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["pass broken-plugin"]["state"] == "note"


# --- optional packages

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ase", "mace"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from fxpass.api import capture
from fxpass.cli import main
for words in WORDS:
    print(main(words))
"""


def test_a_missing_extra(tmp_path: Path) -> None:
    """Without ase and mace: what needs them names the line to type, what does not works."""
    mace_checkpoint(tmp_path / "some.model", b"\x80\x02cmace.modules.models\nMACE\nq\x00.")
    (tmp_path / "some.cif").write_text("data_x\n")
    words = [
        ["optimize", "some.model", "-o", "out.fxp"],
        ["optimize", MODEL, "-o", "out.fxp", "--structures", "some.cif"],
        ["explain", "dead-code"],
    ]
    code = BLOCKED.replace("WORDS", repr(words))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == ["2", "2", "0"], done.stderr
    assert "Traceback" not in done.stderr
    mace, ase = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert 'Try: pip install "fxpass[mace]"' in mace
    assert 'Try: pip install "fxpass[ase]"' in ase
    assert not (tmp_path / "out.fxp").exists()


# --- structures


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2\n\nCu 0 0 0\nPt 0 0 2.5\n", ("some.xyz[0]", "unknown species Pt", "Cu, Ag, Au")),
        ("2\n\nCu 0 0 0\nQq 0 0 2.5\n", ("some.xyz", "Qq")),
        ("0\n\n", ("some.xyz[0]", "no atoms")),
        ("2\n\nCu 0 0 0\nCu 0 0 nan\n", ("some.xyz[0]", "NaN or infinite", "atom 1")),
        ("2\n\nCu 0 -inf 0\nCu 0 0 2.5\n", ("some.xyz[0]", "NaN or infinite", "atom 0")),
        ("2\n\nCu 0 0 0\nCu 0 0 0\n", ("some.xyz[0]", "same place")),
        ("3\n\nCu 0 0 0\n", ("some.xyz", "1 of 3 atoms")),
        ("atoms\n", ("some.xyz", "frame 0")),
        ("", ("some.xyz", "no frames")),
    ],
)
def test_structures_that_make_no_sense(refused: Refused, tmp_path: Path, text: str, says: tuple[str, ...]) -> None:
    (tmp_path / "some.xyz").write_text(text)
    refused("optimize", MODEL, "-o", "out.fxp", "--structures", "some.xyz", says=says)


def test_a_structure_file_that_is_missing(refused: Refused) -> None:
    refused("bench", MODEL, "--structures", "gone.xyz@:3", says=("gone.xyz",))


@pytest.mark.parametrize("example", [7, [7], "gone.xyz"])
def test_no_structures_at_all(example: Any) -> None:
    with pytest.raises(fxpass.UsageError):
        fxpass.optimize(small_potential(), "dead-code", example=example)


# --- files to write


def test_an_existing_result_is_left_as_it_is(refused: Refused, tmp_path: Path) -> None:
    """Said before any work: the model is not even looked for."""
    (tmp_path / "out.fxp").write_bytes(b"precious")
    refused("optimize", "gone.model", "-o", "out.fxp", says=("out.fxp exists", "--overwrite"))
    refused("diff", "gone.model", "--html", "out.fxp", says=("out.fxp exists", "--overwrite"))


def test_an_existing_folder_is_left_as_it_is(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "precious.txt").write_text("precious")
    refused("optimize", "gone.model", "-o", "out.fxp", "--dump", "graphs", says=("graphs exists",))
    refused("optimize", "gone.model", "-o", "graphs", "--overwrite", says=("graphs is a folder",))
    with pytest.raises(fxpass.UsageError, match="graphs exists"):
        fxpass.optimize(small_potential(), "dead-code", dump=tmp_path / "graphs")


def test_a_place_that_cannot_be_written(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refused("optimize", "gone.model", "-o", "gone/out.fxp", says=("gone/out.fxp cannot be written",))
    refused("optimize", "gone.model", "-o", "file/out.fxp", says=("file/out.fxp cannot be written",))
    refused("optimize", "gone.model", "-o", "out.fxp", "--dump", "gone/graphs", says=("gone/graphs cannot be written",))
    refused("diff", "gone.model", "--html", "gone/out.html", says=("gone/out.html cannot be written",))

    def forbidden(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", forbidden)  # a folder without permission: root has every one
    refused("optimize", "gone.model", "-o", "out.fxp", says=("out.fxp cannot be written: Permission denied",))
    refused("optimize", "gone.model", "-o", "out.fxp", "--overwrite", says=("Permission denied",))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "out.fxp"
    path.write_bytes(b"precious")

    def write(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        package.write_new(path, write, overwrite=True)
    assert contents(tmp_path) == {"out.fxp": b"precious"}


def test_a_saved_result_that_is_damaged(refused: Refused, tmp_path: Path) -> None:
    result = fxpass.optimize(small_potential(), "dead-code", verify=False)
    path = tmp_path / "some.fxp"
    result.save(path)
    whole = path.read_bytes()
    with pytest.raises(fxpass.UsageError, match="exists"):
        result.save(path)
    assert path.read_bytes() == whole

    for damage, says in ((write_truncated, "truncated"), (write_altered, "altered"), (write_text, "not a saved")):
        path.write_bytes(whole)
        damage(path)
        refused("verify", "some.fxp", "--against", MODEL, says=("some.fxp", says))
        with pytest.raises(fxpass.PackageError):
            fxpass.load(path)
    assert os.listdir(tmp_path) == ["some.fxp"]

    path.write_bytes(whole)
    refused("optimize", "some.fxp", "-o", "out.fxp", says=("some.fxp",))
