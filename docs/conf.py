import os
from pathlib import Path

import scivi

# Pages with code run in docs/: they find the package from there too, installed or not.
ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

# Pages show no progress bars, so that it does not matter that the kernel has no widgets for them.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

# Notebooks are pages too: copied here with the outputs they hold, their links one folder deeper.
PAGES = Path(__file__).parent / "notebooks"
PAGES.mkdir(exist_ok=True)
for path in Path(ROOT, "notebooks").glob("*.ipynb"):
    text = path.read_text("utf-8").replace("](../data/", "](path:../../data/").replace("](../", "](../../")
    copy = PAGES / path.name
    if not copy.exists() or copy.read_text("utf-8") != text:
        copy.write_text(text, "utf-8")

project = "SciVI"
author = "The SciVI developers"
copyright = "The SciVI developers"
version = release = scivi.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute", ".jupyter_cache"]

html_theme = "pydata_sphinx_theme"
html_title = f"SciVI {release}"
html_static_path = ["_static"]
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
html_sidebars = {"**": []}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# "cache" runs the pages with code when they have changed; a page whose code fails then does not build.
nb_execution_mode = "cache"
nb_execution_excludepatterns = ["notebooks/*"]  # the tests run those
nb_execution_timeout = 300
nb_execution_raise_on_error = True

napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_typehints = (
    "none"  # the signature of a public name is in its docstring's words; shapes are in the source
)
autodoc_member_order = "bysource"
