"""Configuration of Sphinx: pages in MyST, notebooks that the build runs, the API and the command line from the code.

python -m sphinx -W --keep-going docs build/docs
"""

import os

import cytosae_pipeline

project = "cytosae-cache"
author = "The cytosae-cache developers"
copyright = "2026, the cytosae-cache developers"
version = release = cytosae_pipeline.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
exclude_patterns = ["**/.ipynb_checkpoints"]
nitpicky = True
# Types of other packages, whose inventories would have to be downloaded, and our own that are not public.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|np|npt|numpy|pd|pandas|anndata|matplotlib|dask|xarray|zarr|os|pathlib|collections|typing)\..*"),
    ("py:.*", r"AnnData|Figure|Path|optional"),
    ("py:.*", r"cytosae_pipeline\.(config|statistics)\..*|cytosae_cache\.format\..*|cytosae\.(sae|backbones)\..*"),
]

html_theme = "sphinx_book_theme"
html_title = "cytosae-cache"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
# Options are written --like-this.
smartquotes = False
# A name in single backticks is code, as everywhere in the source.
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.mime_priority"]

# Every notebook runs in a folder of its own, in a real kernel, and an error in one of them is an error of the build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
nb_merge_streams = True

# On tiny tensors threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


HIDDEN = "\ue000"


def hide_colons(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from reading `Where it is: a path` as a type and a text, in one-line texts of attributes."""
    if what in ("attribute", "property", "data"):
        lines[:] = [line.replace(": ", HIDDEN) for line in lines]
    lines[:] = map(show_stars, lines)


def show_colons(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Undo `hide_colons`."""
    lines[:] = [line.replace(HIDDEN, ": ") for line in lines]


def show_stars(line: str) -> str:
    """Escape stars beside a quote, which are meant: `'*/class'`."""
    return line.replace("'*", "'\\*").replace("*'", "\\*'")


def show_examples(app: object, context: object, lines: list[str]) -> None:
    """Show the commands of a help text, which click does not wrap, as they are typed."""
    found: list[str] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ") and not before.startswith("| "):
            found += ["", ".. code-block:: shell", ""]
        found.append(line.replace("| ", "    ", 1) if line.startswith("| ") else line)
    lines[:] = found


def show_options(app: object, context: object, lines: list[str]) -> None:
    """Leave out the default of options that may be given several times, which is nothing."""
    lines[:] = [show_stars(line) for line in lines if line.strip() != ":default: ````"]


def setup(app) -> None:  # noqa: ANN001 - a build without types of Sphinx
    """Connect what the code's texts need to be read as reStructuredText."""
    app.connect("autodoc-process-docstring", hide_colons, priority=400)
    app.connect("autodoc-process-docstring", show_colons, priority=600)
    app.connect("sphinx-click-process-description", show_examples)
    app.connect("sphinx-click-process-options", show_options)
