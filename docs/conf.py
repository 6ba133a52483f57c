"""The documentation site: ``sphinx-build -W docs .ci/site``."""

import os
import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

import sqspipes_mp

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

# The width of the usage lines on the page of the command line.
os.environ["COLUMNS"] = "92"

project = "sqspipes_mp"
author = "The sqspipes_mp authors"
copyright = author  # noqa: A001  (Sphinx's name)
release = version = sqspipes_mp.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "commands", "metrics"]
# The builder's own output must not be read as a page.
exclude_patterns = ["_ext", "scripts", "build"]

# Dashes of flags stay two, and a block that does not say what it is has no colours.
smartquotes = False
highlight_language = "none"

html_theme = "furo"
html_title = f"sqspipes_mp {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "tango"
pygments_dark_style = "monokai"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Signatures name a default as the code does, and a type as users import it.
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("TaskLike", "OnError", "Workers", "Policy")}
python_maximum_signature_line_length = 80
napoleon_use_rtype = False


def setup(app: Sphinx) -> None:
    """Show a type's alias by its name, also within another type."""
    app.connect("autodoc-process-signature", _aliases)
    app.connect("doctree-resolved", _dashes)
    app.connect("build-finished", _scripts)


def _scripts(app: Sphinx, error: Exception | None) -> None:
    """Copy the scripts to where the pages' links lead, as they do in the repository."""
    if error is None:
        folder = Path(app.outdir, "scripts")
        folder.mkdir(exist_ok=True)
        for script in Path(app.srcdir, "scripts").glob("*.py"):
            shutil.copy(script, folder)


def _dashes(_app: object, tree: nodes.document, _page: str) -> None:
    """Put a dash between a parameter and its meaning, which smartquotes would have done."""
    for text in list(tree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def _aliases(
    _app: object, _what: str, _name: str, _of: object, _options: object, arguments: str, returned: str
) -> object:
    return re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", arguments or "") or None, returned
