"""Sphinx configuration. `python docs/build.py` builds the site, and fails on any warning."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import spmd_moe  # noqa: E402  # the path above has to be set first

project = "spmd_moe"
author = copyright = "The spmd_moe authors"
version = release = spmd_moe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "spmd_moe"
html_static_path = ["_static"]

myst_heading_anchors = 3
# `py` marks a fragment that is not run (tests/support/docs_blocks.py).
highlight_language = "python"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
