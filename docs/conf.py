"""The documentation site: ``sphinx-build -W docs .ci/site``."""

import sys
from pathlib import Path

import sqspipes_mp

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sqspipes_mp"
author = "The sqspipes_mp authors"
copyright = author  # noqa: A001  (Sphinx's name)
release = version = sqspipes_mp.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "commands"]
# The builder's own output must not be read as a page.
exclude_patterns = ["_ext", "scripts", "build"]

html_theme = "furo"
html_title = f"sqspipes_mp {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "tango"
pygments_dark_style = "monokai"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Signatures name a default as the code does, and a type as users import it.
autodoc_preserve_defaults = True
autodoc_type_aliases = {"TaskLike": "TaskLike", "OnError": "OnError", "Workers": "Workers", "Key": "str | int"}
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
