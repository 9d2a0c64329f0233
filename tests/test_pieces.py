"""What the course promises of its files: every piece runs alone, repeated helpers are the same word
for word, chapters import only backwards, each says what it needs. A rule takes a chapter's path and
returns its complaints; the bad sources below show that each rule can fail."""

import ast
import builtins
import re
import symtable
import sys
import tomllib
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(ROOT.glob("[0-9][0-9]_*.py"))
TORCH = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "Tensor": torch.Tensor}
HELPERS = {
    "check",
    "measure",
    "apply_rope",
}  # repeated without a mark in every chapter that has one
IMPORTERS = {"import_module", "__import__", "run_path", "run_module", "spec_from_file_location"}
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
CONSTANTS = int | float | str | bytes | tuple | frozenset | type | None | torch.dtype
CONSTANTS |= types.GenericAlias | types.UnionType  # names for annotations


class Piece(NamedTuple):
    names: list[str]
    needs: list[str]
    first_line: int
    text: str


def pieces(path: Path) -> list[Piece]:
    """ValueError for a mark without its partner, or one that can't be read."""
    found, marks = [], []
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("# >>> copy"):
            mark = re.fullmatch(r"# >>> copy: ([\w, ]+?)(?: \(needs ([\w, ]+)\))?", line)
            if not mark or marks:
                raise ValueError(f"line {number + 1}: {line!r}")
            marks = [(number + 1, mark)]
        elif line.startswith("# <<< copy"):
            if not marks:
                raise ValueError(f"line {number + 1}: {line!r} closes nothing")
            start, mark = marks.pop()
            names, needs = (re.findall(r"\w+", group or "") for group in mark.groups())
            found.append(Piece(names, needs, start, "\n".join(lines[start:number])))
    if marks:
        raise ValueError(f"line {marks[0][0]}: never closed")
    return found


def load(path: Path) -> types.ModuleType:
    """The chapter as a user imports it (the bad ones below have different names)."""
    sys.path.insert(0, str(path.parent))
    try:
        return import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))


def run_alone(path: Path, piece: Piece) -> dict:
    """The namespace after pasting the piece into a file that has only what its mark asks for."""
    namespace = {"__name__": "a_strangers_file"}
    for need in piece.needs:
        namespace |= TORCH if need == "torch" else {need: getattr(load(path), need)}
    # Compiled at its place in the chapter: Triton reads a kernel's source from its file and line.
    source = "\n" * piece.first_line + piece.text
    exec(compile(source, str(path), "exec", dont_inherit=True), namespace)
    return namespace


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from scopes(child)


def called(node: ast.AST) -> str | None:
    """`f` for f(…) and for a.b.f(…)"""
    target = getattr(node, "func", None)
    return getattr(target, "attr", None) or getattr(target, "id", None)


def definitions(path: Path) -> dict[str, ast.AST]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name: node for node in top_level(tree) if isinstance(node, DEFINITION)}


def top_level(tree: ast.Module | ast.If | ast.Try) -> Iterator[ast.stmt]:
    """Its statements, and those guarded by `if` and `try` (a machine without Triton)."""
    for field in ("body", "handlers", "orelse", "finalbody"):
        for node in getattr(tree, field, []):
            if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
                yield from top_level(node)
            elif not isinstance(node, ast.Pass):
                yield node


# %% The rules ---------------------------------------------------------------------------------


def each_piece_runs_alone(path: Path) -> list[str]:
    wrong = []
    try:
        found = pieces(path)
    except ValueError as error:
        return [str(error)]
    for piece in found:
        try:
            namespace = run_alone(path, piece)
        except Exception as error:
            wrong.append(f"{piece.names}: {error!r}")
            continue
        wrong += [f"{name} is promised, not there" for name in piece.names if name not in namespace]
        known = namespace.keys() | vars(builtins).keys()
        for scope in scopes(symtable.symtable(piece.text, path.name, "exec")):
            for symbol in scope.get_symbols():
                is_global = symbol.is_global() or scope.get_type() == "module"
                if is_global and symbol.is_referenced() and symbol.get_name() not in known:
                    wrong.append(f"{scope.get_name()} uses {symbol.get_name()}: not in the piece")
    if not found and path.name < "06":
        wrong.append("01-05 each have a piece to copy")
    return wrong


def each_piece_is_quiet(path: Path) -> list[str]:
    """No prints, argparse, siblings or state: what would surprise the file it is pasted into."""
    wrong = []
    for piece in pieces(path):
        tree = ast.parse(piece.text)
        for node in ast.walk(tree):
            if called(node) == "print" and isinstance(node.func, ast.Name):
                wrong.append("prints")
            if called(node) in IMPORTERS:
                wrong.append(f"calls {called(node)}")
            if isinstance(node, ast.Import | ast.ImportFrom) and "argparse" in ast.unparse(node):
                wrong.append("imports argparse")
            if isinstance(node, ast.Global):
                wrong.append(f"writes a global: {', '.join(node.names)}")
        namespace = run_alone(path, piece)
        for node in top_level(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = getattr(node, "targets", None) or [node.target]
                for name in (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                    value = namespace.get(name)
                    constexpr = type(value).__name__ == "constexpr"  # Triton's kind of constant
                    if not isinstance(value, CONSTANTS) and not constexpr:
                        wrong.append(f"state at the top: {name}")
            elif not isinstance(node, DEFINITION | ast.Import | ast.ImportFrom):
                wrong.append(f"does something when pasted: {ast.unparse(node)[:60]}")
    return wrong


def repeated_helpers_are_identical(path: Path) -> list[str]:
    wrong, mine = [], definitions(path)
    copies = []  # (name, the file that has the original)
    for name in sorted(HELPERS & mine.keys()):
        owners = [p for p in sorted(path.parent.glob("[0-9][0-9]_*.py")) if name in definitions(p)]
        copies.append((name, owners[0]))
    first_lines = {
        min([node.lineno, *(d.lineno for d in node.decorator_list)]): name
        for name, node in mine.items()
    }
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if mark := re.match(r"\s*# same as (\w+\.py)", line):
            if number + 1 in first_lines:
                copies.append((first_lines[number + 1], path.parent / mark[1]))
            else:
                wrong.append(f"line {number}: marks no def or class")
    for name, owner in copies:
        original = definitions(owner).get(name) if owner.exists() else None
        if original is None:
            wrong.append(f"{name}: not in {owner.name}")
        elif ast.dump(original) != ast.dump(mine[name]):
            wrong.append(f"{name} differs from {owner.name}")
    return wrong


def imports_only_backwards(path: Path) -> list[str]:
    wrong = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            if siblings := [n for n in names if n and (path.parent / f"{n}.py").exists()]:
                wrong.append(f"imports {siblings[0]}")
            if getattr(node, "level", 0):
                wrong.append(f"relative: {ast.unparse(node)}")
        elif called(node) in IMPORTERS:
            target = (
                node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            )
            if not re.fullmatch(r"0\d_\w+", str(target)):
                wrong.append(f"can't tell what this imports: {ast.unparse(node)}")
            elif path.name < "06":
                wrong.append(f"01-05 stand alone: {target}")
            elif target[:2] >= path.name[:2]:
                wrong.append(f"imports forwards: {target}")
    return wrong


def opens_with_its_dependencies(path: Path) -> list[str]:
    source = path.read_text("utf-8")
    block = re.match(r"# /// script\n((?:#(?: .*)?\n)+?)# ///\n", source)
    if not block:
        return ["doesn't open with PEP 723 metadata"]
    try:
        metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    except tomllib.TOMLDecodeError as error:
        return [f"metadata: {error}"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}

    declared = names(metadata.get("dependencies", []))
    wrong = [f"{name}: not in pyproject" for name in declared - names(project["dependencies"])]
    if "requires-python" not in metadata:
        wrong.append("no requires-python")
    for node in ast.walk(ast.parse(source)):  # so that `uv run` works in an empty folder
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        roots = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
        wrong += [f"imports {name}, undeclared" for name in roots - declared]
    return wrong


def docstring_has_its_number(path: Path) -> list[str]:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    start = f"{path.name[:2]} · "
    return [] if docstring.startswith(start) else [f"docstring doesn't start {start!r}"]


def names_no_machine(path: Path) -> list[str]:
    found = re.finditer(r"/(?:work|root|Users|home/\w+)/|/tmp/[v]\b", path.read_text("utf-8"))
    return [f"a path of one machine: {match[0]}" for match in found]


RULES = [
    each_piece_runs_alone,
    each_piece_is_quiet,
    repeated_helpers_are_identical,
    imports_only_backwards,
    opens_with_its_dependencies,
    docstring_has_its_number,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(chapter, rule):
    assert rule(chapter) == []


def public_files() -> list[Path]:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()} | {".git"}
    tops = [top for top in ROOT.iterdir() if top.name not in ignored]
    tops = [top for top in tops if not (top / "pyvenv.cfg").exists()]  # whatever it is called
    files = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top])]
    texts = {".py", ".md", ".toml", ".txt", ".json", ""}  # "": LICENSE, .ci/run
    return sorted(path for path in files if path.is_file() and path.suffix in texts)


@pytest.mark.parametrize("path", public_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_no_machine(path):
    assert names_no_machine(path) == []


# %% Each rule can fail ------------------------------------------------------------------------


def piece(body: str, mark: str = "f (needs torch)") -> str:
    return f"# >>> copy: {mark}\n{body}\n# <<< copy\n"


def script(dependencies: str, rest: str = "") -> str:
    head = f'# requires-python = ">=3.11"\n# dependencies = [{dependencies}]\n'
    return f"# /// script\n{head}# ///\n{rest}"


F = "def f(x): return nn.functional.relu(torch.abs(x)) + F.relu(x)"
GOOD = script('"torch>=2.11"', f'"""03 · Fine."""\nimport torch\n{piece(F)}')
BAD = [  # rule, source, what it must complain about
    (each_piece_runs_alone, piece("import nowhere_to_be_found"), "ModuleNotFoundError"),
    (each_piece_runs_alone, piece("def g(): pass"), "f is promised"),
    (each_piece_runs_alone, piece("def f(): return [math.pi for _ in ()]"), "uses math"),
    (each_piece_runs_alone, piece("class f:\n    def g(s): return lost + 1"), "g uses lost"),
    (each_piece_runs_alone, piece("def f(): return torch.e", "f"), "f uses torch"),
    (each_piece_runs_alone, piece("def f(): pass", "f (needs math)"), "AttributeError"),
    (each_piece_runs_alone, "# >>> copy: f (needs torch)\n", "never closed"),
    (each_piece_runs_alone, "# <<< copy\n", "closes nothing"),
    (each_piece_runs_alone, piece("def f(): pass", "f [torch]"), "line 1"),
    (each_piece_runs_alone, piece(piece(F)), "line 2"),
    (each_piece_runs_alone, "x = 1\n", "each have a piece"),
    (each_piece_is_quiet, piece("def f(): print(1)"), "prints"),
    (each_piece_is_quiet, piece("import argparse"), "argparse"),
    (each_piece_is_quiet, piece("def f():\n    from argparse import FileType"), "argparse"),
    (each_piece_is_quiet, piece("def f(): import_module('02_x')"), "import_module"),
    (each_piece_is_quiet, piece("cache = {}"), "state at the top: cache"),
    (each_piece_is_quiet, piece("if True:\n    w: Tensor = torch.ones(1)"), "state at the top: w"),
    (each_piece_is_quiet, piece("def f():\n    global n\n    n = 1"), "writes a global: n"),
    (each_piece_is_quiet, piece("torch.manual_seed(0)"), "does something when pasted"),
    (repeated_helpers_are_identical, "def check(a): return a\n", "check differs from 01_one.py"),
    (repeated_helpers_are_identical, "# same as 01_one.py\nclass C: x = 2\n", "C differs"),
    (repeated_helpers_are_identical, "# same as 01_one.py\ndef g(): pass\n", "g: not in 01_one"),
    (repeated_helpers_are_identical, "# same as 02_two.py\ndef g(): pass\n", "g: not in 02_two"),
    (repeated_helpers_are_identical, "# same as 01_one.py\n\ndef g(): pass\n", "marks no def"),
    (imports_only_backwards, "import_module('01_one')\n", "01-05 stand alone"),
    (imports_only_backwards, "import importlib as i\ni.import_module(name)\n", "can't tell"),
    (imports_only_backwards, "import helper\n", "imports helper"),
    (imports_only_backwards, "from helper import x\n", "imports helper"),
    (imports_only_backwards, "from . import x\n", "relative"),
    (opens_with_its_dependencies, "import torch\n", "doesn't open"),
    (opens_with_its_dependencies, "#!shebang\n" + GOOD, "doesn't open"),
    (opens_with_its_dependencies, "# /// script\n# dependencies = [\n# ///\n", "metadata: "),
    (opens_with_its_dependencies, script('"torch", "einops>=1"'), "einops: not in pyproject"),
    (opens_with_its_dependencies, script('"numpy"', "from torch.nn import F"), "imports torch"),
    (opens_with_its_dependencies, "# /// script\n# dependencies = []\n# ///\n", "requires-python"),
    (docstring_has_its_number, '"""02 · Another chapter."""\n', "03 · "),
    (docstring_has_its_number, "x = 1\n", "03 · "),
    (names_no_machine, "# see /wo" + "rk/main/x.py\n", "/wo" + "rk/"),
    (names_no_machine, "python = '/tm" + "p/v/venv'\n", "/tm" + "p/v"),
    (names_no_machine, "# /ro" + "ot/x and /ho" + "me/jane/x\n", "jane"),
]


@pytest.fixture
def folder(tmp_path):
    one = "def check(a):\n    return a + 1\n\nclass C: x = 1\n"
    (tmp_path / "01_one.py").write_text(one, "utf-8")
    (tmp_path / "helper.py").write_text("x = 1\n")
    return tmp_path


@pytest.mark.parametrize("case", range(len(BAD)), ids=lambda i: f"{BAD[i][0].__name__}-{BAD[i][2]}")
def test_a_bad_source_is_caught(folder, case):
    rule, source, complaint = BAD[case]
    path = folder / f"03_bad_{case}.py"
    path.write_text(source, "utf-8")
    assert complaint in "; ".join(rule(path))


def test_a_good_source_passes(folder):
    same = "\n\n# same as 01_one.py\nclass C:\n    x = 1  # laid out in another way\n"
    path = folder / "03_good.py"
    path.write_text(GOOD + same + piece("def g(): return f", "g (needs f)"), "utf-8")
    assert {rule.__name__: rule(path) for rule in RULES if rule(path)} == {}
    assert names_no_machine(path) == []


def test_from_06_on_chapters_import_smaller_numbers(folder):
    path = folder / "06_train.py"
    path.write_text("import_module('01_one')\nimport_module('05_mtp')\n", "utf-8")
    assert imports_only_backwards(path) == []
    path.write_text("import_module('06_train')\nimport_module('07_grpo')\n", "utf-8")
    assert len(imports_only_backwards(path)) == 2


def test_constants_and_guards_may_stand_in_a_piece(folder):
    body = "try:\n    import math\nexcept ImportError:\n    math = None\n"
    path = folder / "03_constants.py"
    path.write_text(piece(f"import math\nWIDEST = 448.0\nTILE = (1, 128)\n{F}"), "utf-8")
    assert each_piece_is_quiet(path) == each_piece_runs_alone(path) == []
    path.write_text(piece(body.replace("math = None", "pass") + F), "utf-8")
    assert each_piece_is_quiet(path) == []
