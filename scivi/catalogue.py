"""The templates that a package offers, read from its source: nothing is imported, so that it takes no time.

A module offers the templates that it assigns at top level, and functions from data to a template and data.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from scivi.errors import DataError, TemplateError

OURS = "domains"  # the package of templates that is installed with scivi, which never imports it
MAKERS = ("Template", "make")  # a call of which, at top level, makes a template: how the house writes it


@dataclass(frozen=True, slots=True)
class Offer:
    """One template, or one function from data to a template and data.

    Args:
        reference: as "module:name".
        about: first line of its docstring, or of its module's.
        takes_data: whether it is a function.
    """

    reference: str
    about: str
    takes_data: bool


def offers(package: str) -> list[Offer]:
    """All that a package or module offers, by name.

    Raises:
        DataError: there is no such package, or a module of it is no Python.
    """
    return [offer for name, path in _files(package) for offer in _of_file(name, path)]


def near(word: str, known: Iterable[str]) -> str:
    """The nearest of some words, as the end of a sentence; empty if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{found[0]}"?' if found else ""


def neighbours(reference: str) -> list[str]:
    """References that a misspelt one may have meant: of its package, of ours, of the folder one is in."""
    found, here = [], (path.stem for path in Path.cwd().glob("*.py") if path.stem.isidentifier())
    for package in {OURS, reference.partition(":")[0].partition(".")[0], *here}:
        try:
            found += [offer.reference for offer in offers(package)]
        except DataError:  # no such package, which is why one asks
            continue
    return sorted({*found} - {reference})


def refuse_misspelt(reference: str) -> None:
    """Refuse a reference to a module that cannot be found, before anything heavy is loaded.

    Raises:
        TemplateError: the nearest reference is told.
    """
    module = reference.partition(":")[0]
    try:
        found = all(part.isidentifier() for part in module.split(".")) and find_spec(module) is not None
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # its package is there, and lacks one it needs
            return
        found = False
    except ValueError:  # it runs already, as __main__ does, and was never looked for
        return
    if not found:
        guess = near(reference, neighbours(reference))
        told = guess or '; is its folder on the path? "scivi templates" lists those that are installed.'
        raise TemplateError(f'there is no module "{module}"{told}')


def _files(package: str) -> Iterator[tuple[str, Path]]:
    """Name and file of every module."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise DataError(f'there is no package "{package}".')
    for place in spec.submodule_search_locations or ():
        for path in sorted(Path(place).rglob("*.py")):
            parts = path.relative_to(place).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path
    if not spec.submodule_search_locations and spec.origin and spec.origin.endswith(".py"):
        yield package, Path(spec.origin)


def _of_file(module: str, path: Path) -> Iterator[Offer]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise DataError(f'"{path}" is no Python: {error}.') from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and _is_template(node.value):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from (Offer(f"{module}:{name}", _first_line(tree), False) for name in names)
        elif isinstance(node, ast.FunctionDef) and _takes_data(node):
            yield Offer(f"{module}:{node.name}", _first_line(node) or _first_line(tree), True)


def _is_template(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in MAKERS


def _takes_data(function: ast.FunctionDef) -> bool:
    """Whether it returns a template and data, and needs one argument and no other."""
    returns = "" if function.returns is None else ast.unparse(function.returns)
    given = function.args
    needed = len(given.posonlyargs) + len(given.args) - len(given.defaults)
    needed += sum(default is None for default in given.kw_defaults)
    named = function.name == "from_data" or returns.startswith(("tuple[Template,", "tuple[scivi.Template,"))
    return named and needed == 1 and bool(given.posonlyargs or given.args)


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]
