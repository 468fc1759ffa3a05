"""The import rules of docs/architecture.md, held by reading every module's syntax tree.

Longer than 400 lines because the reader stands beside the rules: a rule is worth what its reader sees.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

# Floors of the house: an arrow goes down only. Packages on one floor do not know each other.
FLOORS = {
    "scivi.errors": 1,
    "scivi.files": 1,
    "scivi.shown": 1,
    "scivi.version": 1,
    "scivi.extras": 1,
    "scivi.catalogue": 2,
    "scivi.starter": 2,
    "scivi.watch": 2,
    "scivi.inputs": 2,
    "scivi.ode": 2,
    "scivi.analysis": 2,
    "scivi.models": 3,
    "scivi.inference": 4,
    "domains.finance.neural_forecasts": 6,  # scored as a backtest is
    "domains.finance.factor_volatility": 6,  # so is this
    "domains.finance.backtest": 5,  # fits again and again: what is judged is the whole
    "domains": 4,
    "scivi.sbc": 5,
    "scivi.laws": 5,
    "scivi.doctor": 5,
    "scivi.summaries": 5,
    "scivi.studies": 5,
    "scivi.cli": 6,
}
BACKTESTS = {  # they run fits
    "domains.finance.backtest",
    "domains.finance.neural_forecasts",
    "domains.finance.factor_volatility",
}
# Above them all stands scivi itself: the public names, resolved on first use.
ROOT_PACKAGE = "scivi"

# Imported inside functions only: heavy, optional, or not wanted on a machine that only reads results.
INSIDE_FUNCTIONS = {
    "anndata",
    "zarr",
    "nutpie",
    "matplotlib",
    "arviz_plots",
    "torchdiffeq",
    "tensorboard",
    "torch.utils.tensorboard",
    "mlflow",
}

# Process-wide state, and code in saved files.
EXEMPT = {("scivi.laws", "pyro.get_param_store"), ("scivi.inference.capture", "torch.set_num_threads")}
FORBIDDEN = {
    "pyro.param",
    "pyro.module",
    "pyro.random_module",
    "pyro.clear_param_store",
    "pyro.get_param_store",  # to look at it is the business of the laws alone
    "pyro.optim",
    "pyro.set_rng_seed",
    "pyro.enable_validation",
    "pyro.distributions.enable_validation",
    "torch.distributions.Distribution.set_default_validate_args",
    "torch.set_default_dtype",
    "torch.set_default_device",
    "torch.set_default_tensor_type",
    "torch.set_num_threads",  # but for the time of one compiled call
    "torch.set_num_interop_threads",
    "torch.set_float32_matmul_precision",
    "torch.set_printoptions",
    "torch.use_deterministic_algorithms",
    "torch.autograd.set_detect_anomaly",
    "torch.load",
    "torch.save",
    "numpy.random.seed",
    "numpy.seterr",
    "numpy.set_printoptions",
    "random.seed",
    "matplotlib.use",
    "matplotlib.pyplot.style.use",
    "matplotlib.style.use",
    "pickle",
    "cloudpickle",
    "joblib",
    "dill",
}

# The only places that import by a name made at run time.
DYNAMIC_IMPORTS = {"scivi", "scivi.cli", "scivi.models.named"}

# Import name -> distribution, where the two differ.
DISTRIBUTIONS = {"pyro": "pyro-ppl", "libsbml": "python-libsbml", "mlflow": "mlflow-skinny"}


@dataclass(frozen=True)
class Import:
    """One imported name: where it stands, what it names, and whether it runs when the module is loaded."""

    module: str
    target: str
    line: int
    at_load: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


@dataclass(frozen=True)
class Module:
    """One source file, read."""

    name: str
    is_package: bool
    text: str
    tree: ast.Module


def read_modules(root: Path) -> dict[str, Module]:
    """Every module of scivi and domains below a root, by dotted name."""
    modules = {}
    for folder in ("scivi", "domains"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            text = path.read_text(encoding="utf-8")
            modules[name] = Module(name, is_package, text, ast.parse(text, str(path)))
    return modules


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_of(module: Module) -> Iterator[Import]:
    """Every import of a module; ``from a import b`` names ``a.b``."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module.name, alias.name, node.lineno, at_load)
        elif isinstance(node, ast.ImportFrom):
            source = absolute_source(module, node)
            for alias in node.names:
                target = source if alias.name == "*" else f"{source}.{alias.name}"
                yield Import(module.name, target, node.lineno, at_load)
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            for child in node.body:
                yield from visit(child, at_load=False)
            for child in node.orelse:
                yield from visit(child, at_load)
        else:
            deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_load and not deferred)

    return visit(module.tree, at_load=True)


def absolute_source(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*base, node.module] if node.module else base)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def in_any(name: str, packages: set[str]) -> bool:
    return any(within(name, package) for package in packages)


def is_ours(name: str) -> bool:
    return within(name, "scivi") or within(name, "domains")


def module_of(target: str, modules: dict[str, Module]) -> str:
    """The module of ours that a name lies in: scivi.models.template.Template -> scivi.models.template."""
    while target not in modules and "." in target:
        target = target.rpartition(".")[0]
    return target


def package_of(name: str) -> str:
    """The room that a module stands in: one of the keys of FLOORS, or scivi itself."""
    rooms = [room for room in FLOORS if within(name, room)]
    return rooms[0] if rooms else name


def dotted_uses(module: Module) -> Iterator[tuple[str, int]]:
    """Every dotted name that is used, with aliases resolved: ``import pyro as p; p.param`` -> pyro.param."""
    meaning: dict[str, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                meaning[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                meaning[alias.asname or alias.name] = f"{absolute_source(module, node)}.{alias.name}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute | ast.Name):
            text = ast.unparse(node)
            head, _, rest = text.partition(".")
            if head in meaning:
                yield meaning[head] + (f".{rest}" if rest else ""), node.lineno


MODULES = read_modules(ROOT)
IMPORTS = [found for module in MODULES.values() for found in imports_of(module)]


def test_reader_sees_every_form_of_import(tmp_path):
    # The rules below are only as good as the reader: a planted module with every form must be read in full.
    (tmp_path / "scivi" / "room").mkdir(parents=True)
    (tmp_path / "scivi" / "room" / "planted.py").write_text(
        "import a.b\n"
        "from c import d as e\n"
        "from . import sibling\n"
        "from ..errors import SciVIError\n"
        "if TYPE_CHECKING:\n    import f\n"
        "def g():\n    import h\n    with h.x():\n        from i import j\n"
        "class K:\n    import k\n"
        "def l(m=e.param): pass\n"
    )
    module = read_modules(tmp_path)["scivi.room.planted"]
    assert {(found.target, found.at_load) for found in imports_of(module)} == {
        ("a.b", True),
        ("c.d", True),
        ("scivi.room.sibling", True),
        ("scivi.errors.SciVIError", True),
        ("f", False),
        ("h", False),
        ("i.j", False),
        ("k", True),
    }
    assert ("c.d.param", 13) in set(dotted_uses(module))


def test_every_module_stands_on_a_floor():
    assert [name for name in MODULES if name != ROOT_PACKAGE and package_of(name) not in FLOORS] == []


def test_arrows_go_down_only():
    wrong = []
    for found in IMPORTS:
        if found.module == ROOT_PACKAGE or not is_ours(found.target):
            continue
        here, there = package_of(found.module), package_of(module_of(found.target, MODULES))
        if here != there and there in FLOORS and FLOORS[here] <= FLOORS[there]:
            wrong.append(str(found))
    assert wrong == []


def test_no_import_circle():
    # Imports inside functions and for type checkers count: a circle is a circle.
    arrows: dict[str, set[str]] = {name: set() for name in MODULES if name != ROOT_PACKAGE}
    for found in IMPORTS:
        target = module_of(found.target, MODULES)
        if found.module in arrows and target in arrows and target != found.module:
            arrows[found.module].add(target)
    # Take away whoever imports nobody that is left; what stays is on a circle or above one.
    while removable := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in removable:
            del arrows[name]
    assert {name: sorted(targets & arrows.keys()) for name, targets in arrows.items()} == {}


def test_scivi_never_imports_domains_and_nothing_imports_cli():
    assert [
        str(found) for found in IMPORTS if within(found.module, "scivi") and within(found.target, "domains")
    ] == []
    assert [str(found) for found in IMPORTS if within(found.target, "scivi.cli")] == []


def test_root_gives_its_own_modules_nothing():
    # What is taken from the root is an arrow up, through the lazy names.
    from_root = [found for found in IMPORTS if module_of(found.target, MODULES) == ROOT_PACKAGE]
    assert [str(found) for found in from_root if ROOT_PACKAGE != found.module] == []


def test_a_template_knows_no_optimiser_no_file_and_no_device():
    allowed = {"scivi.errors", "scivi.inputs.fields", "scivi.models", "scivi.ode", "scivi.analysis"}
    readers = {"domains.genomics.methylomes", "domains.genomics.methylome_files"}  # of text, to tables
    readers |= {f"domains.kinetics.{name}" for name in ("sbml", "petab_tables", "petab_cells", "predators")}
    refused = {
        "scivi.models.binding",
        "torch.optim",
        "pyro.optim",
        "pyro.infer",
        "torch.cuda",
        "pathlib",
        "h5netcdf",
    }
    wrong = []
    for found in IMPORTS:
        if not within(found.module, "domains") or found.module in BACKTESTS:
            continue
        science = ".".join(found.module.split(".")[:2])
        neighbour = within(found.target, "domains") and not within(found.target, science)
        outside = within(found.target, "scivi") and not in_any(found.target, allowed)
        reading = found.module in readers and within(found.target, "pathlib")
        if neighbour or outside or (in_any(found.target, refused) and not reading):
            wrong.append(str(found))
    assert wrong == []


def test_analysis_imports_errors_and_itself_and_no_torch():
    ours = {"scivi.analysis", "scivi.errors"}
    refused = {"torch", "pyro", "anndata", "torchdiffeq", "zuko", "safetensors"}
    assert [
        str(found)
        for found in IMPORTS
        if within(found.module, "scivi.analysis")
        and (in_any(found.target, refused) or (is_ours(found.target) and not in_any(found.target, ours)))
    ] == []


@pytest.mark.parametrize(
    ("package", "refused", "but"),
    [
        ("scivi.models", {"scivi.inference", "scivi.analysis"}, None),
        ("scivi.ode", {"scivi.inference", "scivi.analysis", "scivi.inputs", "scivi.models"}, None),
        ("scivi.inputs", {"scivi.inference", "scivi.analysis"}, None),
        ("scivi.inputs", {"pyro"}, "scivi.inputs.batches"),
        ("scivi.inference", {"scivi.analysis"}, "scivi.inference.trees"),  # a posterior leaves with a verdict
        ("scivi.inference.plan", {"torch", "pyro"}, None),
        ("scivi.studies", {"torch", "pyro"}, None),
    ],
)
def test_packages_import_nothing_that_is_refused(package, refused, but):
    assert [
        str(found)
        for found in IMPORTS
        if within(found.module, package) and found.module != but and in_any(found.target, refused)
    ] == []


def test_heavy_packages_are_imported_inside_functions():
    assert [str(found) for found in IMPORTS if found.at_load and in_any(found.target, INSIDE_FUNCTIONS)] == []


def test_no_process_wide_state_and_no_code_in_files():
    used = {
        f"{module.name}:{line} uses {name}"
        for module in MODULES.values()
        for name, line in dotted_uses(module)
        if in_any(name, FORBIDDEN) and (module.name, name) not in EXEMPT
    }
    imported = {str(found) for found in IMPORTS if in_any(found.target, FORBIDDEN)}
    assert sorted(used | imported) == []


def test_global_seed_is_set_only_where_it_is_restored():
    # Pyro draws from torch's global stream: a function may seed it if it also forks or restores the stream.
    wrong = []
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef):
                text = ast.unparse(node)
                if "torch.manual_seed(" in text and not re.search(r"fork_rng|set_rng_state", text):
                    wrong.append(f"{module.name}:{node.lineno} {node.name}")
    assert wrong == []


def test_imports_by_text_only_where_templates_are_found():
    assert {
        module.name
        for module in MODULES.values()
        for name, _ in dotted_uses(module)
        if name in {"importlib.import_module", "importlib.util.spec_from_file_location", "runpy.run_path"}
    } <= DYNAMIC_IMPORTS


def test_every_imported_distribution_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {distribution_of(requirement) for requirement in project["dependencies"]}
    extras = {
        distribution_of(requirement)
        for extra in project["optional-dependencies"].values()
        for requirement in extra
    }
    wrong = []
    for found in IMPORTS:
        top = found.target.partition(".")[0]
        if top in sys.stdlib_module_names or is_ours(top):
            continue
        distribution = DISTRIBUTIONS.get(top, top.replace("_", "-"))
        if distribution not in (core if found.at_load else core | extras):
            wrong.append(str(found))
    assert wrong == []


def distribution_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9.-]+", requirement)
    assert match is not None
    return match.group().lower()


@pytest.mark.parametrize("module", ["scivi", "scivi.errors", "scivi.analysis", "scivi.inference.plan"])
def test_loads_without_torch_and_pyro(module):
    code = f"import sys, {module}; print(*{{'torch', 'pyro', 'anndata', 'matplotlib'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_analysis_works_where_torch_cannot_be_imported():
    # Stronger than not loading it: every module of analysis loads where torch and pyro are refused.
    modules = sorted(name for name in MODULES if within(name, "scivi.analysis"))
    refuse = "import sys; sys.modules.update(torch=None, pyro=None)"
    code = "\n".join([refuse, *(f"import {module}" for module in modules)])
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def told_files() -> list[str]:
    """The files in the page's table, by dotted name; one without a folder lies beside that before it."""
    table = re.search(r"\| file \| its one job \|\n\|.*\n((?:\|.*\n)+)", ARCHITECTURE)
    assert table is not None
    found = []
    for row in table[1].splitlines():
        folder = ""
        for named in re.findall(r"`([\w/]+)`", row.split("|")[1]):
            folder = named.rpartition("/")[0] or folder
            whole = named if "/" in named else f"{folder}/{named}".strip("/")
            found.append((whole if whole.startswith("domains/") else f"scivi/{whole}").replace("/", "."))
    return found


def test_the_architecture_page_names_every_file_once():
    told = told_files()
    assert sorted(told) == sorted({*told}), "a file stands there twice"
    packages = {name for name, module in MODULES.items() if module.is_package}  # public names, most of them
    assert {*told} - {*MODULES} == set(), "no such file"
    assert {*MODULES} - {*told} - packages == set(), "not on the page"


def test_the_architecture_page_draws_the_floors():
    picture = ARCHITECTURE.split("```text")[1].split("```")[0]
    drawn = {int(n): text for n, text in re.findall(r"^floor (\d)(.*?)(?=^floor|\Z)", picture, re.M | re.S)}
    missing = [
        f"{name}: floor {floor}"
        for name, floor in FLOORS.items()
        if name not in BACKTESTS and not re.search(rf"\b{name.removeprefix('scivi.')}\b", drawn[floor])
    ]
    assert missing == []


def test_what_is_long_says_why():
    """A module of more than 400 lines does, and a function of more than 60, its docstring apart."""
    faults = []
    for name, source in MODULES.items():
        lines = source.text.splitlines()
        if len(lines) > 400 and "Longer than 400 lines because" not in (ast.get_docstring(source.tree) or ""):
            faults.append(f"{name}: {len(lines)} lines")
        for found in ast.walk(source.tree):
            if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            own = "\n".join(lines[found.lineno - 1 : found.end_lineno])
            told = found.body[0]
            words = (told.end_lineno or 0) - told.lineno + 1 if ast.get_docstring(found) is not None else 0
            size = (found.end_lineno or 0) - found.lineno + 1 - words
            if size > 60 and "Longer than 60 lines because" not in own:
                faults.append(f"{name}.{found.name}: {size} lines")
    assert faults == []


def test_public_names_are_the_promised_ones():
    import scivi

    nouns = {"Field", "Template", "Plan", "Fit"}
    verbs = {"simulate", "check", "fit", "fit_many", "train", "draw", "predict", "nuts", "save", "load"}
    verbs |= {"calibrate"}
    assert set(scivi.__all__) == nouns | verbs | {"models", "analysis", "errors"}
    assert all(getattr(scivi, name) is not None for name in scivi.__all__)
    with pytest.raises(AttributeError, match='has no attribute "Model"'):
        _ = scivi.Model


def test_every_public_call_leaves_the_param_store_empty(tmp_path):
    import numpy as np
    import pyro
    import pyro.distributions as dist
    import xarray as xr

    import scivi

    def model(batch, prior, nets):
        level = pyro.sample("level", dist.Normal(0.0, 5.0))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(level, 1.0))

    template = scivi.Template(
        name="level",
        rows="row",
        model=model,
        fields={"y": scivi.Field(("row",), role="observed")},
        dims={"level": ()},
    )
    table = xr.Dataset({"y": ("row", np.linspace(-1.0, 1.0, 12))})
    stars = xr.Dataset({"y": (("star", "row"), np.linspace(-1.0, 1.0, 24).reshape(2, 12))})
    plan = scivi.Plan(steps=20, rows_per_batch=4, log_every=5)
    fit = scivi.fit(template, table, plan)
    calls = {
        "simulate": lambda: scivi.simulate(template, {"row": 5}, seed=0),
        "check": lambda: scivi.check(template, like=table, seed=0),
        "fit": lambda: scivi.fit(template, table, plan),
        "fit_many": lambda: scivi.fit_many(template, stars, "star", scivi.Plan(steps=20, log_every=5)),
        "train": lambda: list(scivi.train(template, table, plan)),
        "draw": lambda: scivi.draw(fit, table, draws=10, seed=0),
        "predict": lambda: scivi.predict(fit, table, draws=10, seed=0),
        "nuts": lambda: scivi.nuts(template, table, draws=10, warmup=10, chains=1, backend="pyro"),
        "calibrate": lambda: scivi.calibrate(template, {"row": 5}, fits=2, plan=plan, progress=False),
        "save": lambda: scivi.save(fit, tmp_path / "fit"),
        "load": lambda: scivi.load(tmp_path / "fit", template=template),
    }
    left = {}
    for verb, call in calls.items():
        call()
        if names := sorted(pyro.get_param_store().keys()):
            left[verb] = names
    assert left == {}
