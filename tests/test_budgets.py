"""The limits that our own sources keep. A ratchet: they may only get stricter."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_pearl"
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
POSTPONED_WORK = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b", re.IGNORECASE)
FACTORIES = {
    f"torch.{name}"
    for name in (
        "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand",
        "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
    )
}  # fmt: skip

TRANSFORMERS = (GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Found:
    """One definition: where it stands, what encloses it, and whether users see it."""

    def __init__(self, path: Path, node: Definition, parents: tuple[Definition, ...]) -> None:
        self.node, self.parents = node, parents
        name = ".".join(each.name for each in (*parents, node))
        self.where = f"{path.relative_to(ROOT)}:{node.lineno} {name}"

    @property
    def is_public(self) -> bool:
        """Whether neither it nor what encloses it is private; what is inside a function is."""
        in_function = any(isinstance(each, Function) for each in self.parents)
        return not in_function and not any(each.name.startswith("_") for each in (*self.parents, self.node))

    @property
    def needs_docstring(self) -> bool:
        """Whether it is public and not another signature (overload, setter) of something documented."""
        decorators = {ast.unparse(each).rpartition(".")[2] for each in self.node.decorator_list}
        return self.is_public and not decorators & {"overload", "setter", "deleter"}

    @property
    def untyped(self) -> list[str]:
        """The names of a function's arguments without annotation, and "return"; `self` and `cls` need none."""
        if not isinstance(self.node, Function):
            return []
        arguments = self.node.args
        named = [*arguments.posonlyargs, *arguments.args]
        is_static = any(ast.unparse(each) == "staticmethod" for each in self.node.decorator_list)
        if self.parents and isinstance(self.parents[-1], ast.ClassDef) and not is_static:
            named = named[1:]
        every = [*named, *arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]
        missing = [each.arg for each in every if each.annotation is None]
        return missing + (["return"] if self.node.returns is None and self.node.name != "__init__" else [])


def walk(path: Path, node: ast.AST, parents: tuple[Definition, ...] = ()) -> Iterator[Found]:
    """Yield every function and class below a node, outermost first."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield Found(path, child, parents)
            yield from walk(path, child, (*parents, child))
        else:
            yield from walk(path, child, parents)


def sources(folder: Path) -> list[Path]:
    """List the Python files of a folder and of those below it."""
    return sorted(folder.rglob("*.py"))


@pytest.fixture(scope="module")
def definitions() -> list[Found]:
    """Return every function and class of the package; there must be some, or the tests below would say nothing."""
    found = [each for path in sources(PACKAGE) for each in walk(path, ast.parse(path.read_text("utf-8")))]
    assert found, f"no function or class found below {PACKAGE}"
    return found


def test_no_file_is_too_long() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in sources(PACKAGE)}
    assert lengths
    assert [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_FILE_LINES] == []


def test_no_function_is_too_long(definitions: list[Found]) -> None:
    lengths = {
        each.where: each.node.end_lineno - each.node.lineno + 1
        for each in definitions
        if isinstance(each.node, Function) and each.node.end_lineno
    }
    assert [f"{where}: {length} lines" for where, length in lengths.items() if length > MAX_FUNCTION_LINES] == []


def test_everything_public_has_a_docstring(definitions: list[Found]) -> None:
    assert [each.where for each in definitions if each.needs_docstring and not ast.get_docstring(each.node)] == []


def test_every_function_is_fully_typed(definitions: list[Found]) -> None:
    assert [f"{each.where}: {', '.join(each.untyped)}" for each in definitions if each.untyped] == []


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    """Else `torch.set_default_device("cuda")`, or `with torch.device(...)` around a call, would move our own.

    Parameters of modules follow that device, as torch's do.
    """
    silent, num_named = [], 0
    for path in (each for each in sources(PACKAGE) if "benchmark" not in each.parts):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        of_modules = {id(each) for call in calls if ast.unparse(call.func) == "nn.Parameter" for each in call.args}
        for call in calls:
            if ast.unparse(call.func) in FACTORIES and id(call) not in of_modules:
                is_named = any(keyword.arg in ("device", None) for keyword in call.keywords)
                num_named += is_named
                silent += [] if is_named else [f"{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call)}"]
    assert num_named
    assert silent == []


def private_names_of_transformers() -> set[str]:
    """Attributes of its classes, and of configurations, that begin with one underscore and are not torch's."""
    names = {name for kind in TRANSFORMERS for name in (*dir(kind), *getattr(kind, "__annotations__", ()))}
    names |= vars(GenerationConfig()).keys() | vars(PreTrainedConfig()).keys()
    return {name for name in names - {*dir(torch.nn.Module())} if re.match(r"_[^_]", name)}


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every attribute, imported name and text of a module, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, each.name) for each in node.names)


def test_private_names_of_transformers_appear_in_compat_only() -> None:
    private = private_names_of_transformers()
    found = {
        path: [f"{path.relative_to(ROOT)}:{line} {name}" for line, name in names_in(tree) if name in private]
        for path in sources(PACKAGE)
        for tree in [ast.parse(path.read_text("utf-8"))]
    }
    assert found.pop(PACKAGE / "compat.py")
    assert list(itertools.chain(*found.values())) == []


@pytest.mark.parametrize("folder", ["hf_pearl", "tests"])
def test_no_work_is_postponed_in_the_code(folder: str) -> None:
    lines = [
        (f"{path.relative_to(ROOT)}:{number}", line)
        for path in sources(ROOT / folder)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
    ]
    assert lines
    assert [f"{where} {line.strip()}" for where, line in lines if POSTPONED_WORK.search(line)] == []


def test_every_module_is_named_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    modules = [path for path in sources(PACKAGE) if path.name != "__init__.py"]
    assert modules
    unnamed = [path for path in modules if not re.search(rf"(?<![\w.]){re.escape(path.name)}\b", text)]
    assert [str(path.relative_to(ROOT)) for path in unnamed] == []


def test_every_test_file_holds_a_test() -> None:
    empty = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        names = [node.name for node in ast.walk(tree) if isinstance(node, Definition)]
        names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]  # TestCache = CacheMachine.TestCase
        if not any(re.match(r"test_|Test", name) for name in names):
            empty.append(path.name)
    assert empty == []


def test_the_checks_can_fail() -> None:
    code = (
        "class Shown:\n"
        "    def told(self, a, *, b: int, **rest) -> None: ...\n"
        "    def _hidden(self) -> None: ...\n"
        "    @staticmethod\n"
        "    def fixed(c) -> int: ...\n"
        "    @property\n"
        "    def size(self) -> int:\n"
        "        '''Documented.'''\n"
        "    @size.setter\n"
        "    def size(self, value: int) -> None: ...\n"
        "def outer():\n"
        "    def inner(x): ...\n"
    )
    found = list(walk(ROOT / "code.py", ast.parse(code)))
    silent = [each.where.split()[1] for each in found if each.needs_docstring and not ast.get_docstring(each.node)]
    assert silent == ["Shown", "Shown.told", "Shown.fixed", "outer"]
    assert {each.where.split()[1]: each.untyped for each in found if each.untyped} == {
        "Shown.told": ["a", "rest"],
        "Shown.fixed": ["c"],
        "outer": ["return"],
        "outer.inner": ["x", "return"],
    }
    told = {name for _, name in names_in(ast.parse("getattr(model, '_is_stateful'), config._attn_implementation"))}
    assert {"_is_stateful", "_attn_implementation"} <= told & private_names_of_transformers()
    assert POSTPONED_WORK.search("# to" + "do: later")
    assert not POSTPONED_WORK.search("mastodon")
