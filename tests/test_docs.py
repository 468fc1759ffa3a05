"""The pages of the documentation: found from the index, with links and names that lead somewhere.

What Sphinx sees when it builds with -W is left to it; here is what needs no build.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from scivi.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md"]
OURS = ("scivi", "domains")
FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1[ \t]*$", re.S | re.M)


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, code cells among those of Python."""
    found = []
    for _, word, text in FENCE.findall(path.read_text(encoding="utf-8")):
        language = word.removeprefix("{code-cell}").strip()
        if language in languages:
            found.append("".join(line for line in text.splitlines(True) if not line.startswith((":", "%"))))
    return found


def prose(path: Path) -> str:
    """A page without its fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    """What a link may name of a page, as GitHub and MyST make it of the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_one_table_of_contents():
    entries = []
    for _, word, text in FENCE.findall((ROOT / "docs/index.md").read_text(encoding="utf-8")):
        if word == "{toctree}":
            entries += [line.strip() for line in text.splitlines() if line.strip() and line[0] != ":"]
    notebooks = [f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(entries) == sorted([*notebooks, *(page.stem for page in PAGES if page.stem != "index")])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        if path in PAGES and name.startswith("notebooks/"):  # copied there when the site is built
            name = f"../{name}"
        to = (path.parent / name).resolve() if name else path
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors(to)):
            lost.append(target)
    assert lost == []


def known(tree: ast.Module, names: dict[str, ModuleType]) -> Iterator[str]:
    """Names of ours that a block uses and that do not exist; what it imports is added to ``names``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] in OURS:
                    module = importlib.import_module(each.name)
                    names[each.asname or each.name] = module
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            for each in node.names:
                found = attribute(str(node.module), each.name)
                if found is None:
                    yield f"{node.module}.{each.name}"
                elif isinstance(found, ModuleType):
                    names[each.asname or each.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            module = names[node.value.id].__name__
            if attribute(module, node.attr) is None:
                yield f"{module}.{node.attr}"


def attribute(module: str, name: str) -> object | None:
    """What a module offers under a name, a module within it too."""
    if (found := getattr(importlib.import_module(module), name, None)) is not None:
        return found
    try:
        return importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return None


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_python_on_a_page_parses_and_names_what_there_is(path):
    names: dict[str, ModuleType] = {"scivi": importlib.import_module("scivi")}
    faults = []
    for block in blocks(path, "python"):
        faults += known(ast.parse(block), names)
    assert faults == []


def commands(path: Path) -> Iterator[list[str]]:
    """The ``scivi`` commands of a page, as words."""
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|", line):
                words = shlex.split(part.strip(), comments=True)
                if words and words[0].rpartition("/")[2] == "scivi":
                    yield words[1:]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_commands_on_a_page_have_options_that_exist(path):
    faults = []
    command: Any
    for words in commands(path):
        command, rest = typer.main.get_command(app), list(words)
        while rest and hasattr(command, "commands"):
            at = command.commands.get(rest[0])
            if at is None:
                faults.append(f"scivi {' '.join(words)}: no verb {rest[0]}")
                break
            command, rest = at, rest[1:]
        else:
            offered = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
            faults += [
                f"scivi {' '.join(words)}: {w}" for w in rest if w.startswith("--") and w not in offered
            ]
            for word in rest:
                module, colon, name = word.partition(":")
                if colon and module.startswith("domains.") and attribute(module, name) is None:
                    faults.append(f"scivi {' '.join(words)}: {word}")
    assert faults == []


def test_the_report_page_names_every_check():
    names = set()
    for file in ("fit_rules", "model_rules", "verdict", "report"):
        for node in ast.walk(ast.parse((ROOT / f"scivi/analysis/{file}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if node.func.id in ("Check", "either", "graded", "note") and isinstance(first, ast.Constant):
                    names.add(str(first.value))
    assert len(names) > 30, "the checks were not found: were their makers renamed?"
    page = (ROOT / "docs/read-the-report.md").read_text(encoding="utf-8")
    cells = {name.strip() for row in re.findall(r"^\| ([^|]+) \|", page, re.M) for name in row.split(",")}
    assert sorted(names - cells) == []


def test_what_the_scripts_of_the_documentation_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = [*project["dependencies"], *project["optional-dependencies"]["docs"]]
    declared = {re.split(r"[^\w-]", one)[0].lower() for one in known} | {"scivi", "domains"}
    lacking = set()
    for path in sorted((ROOT / "docs").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            lacking |= {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert {"pillow" if name == "PIL" else name for name in lacking} - declared == set()
