"""Sphinx: the pages in Markdown, the reference from the docstrings."""

import importlib.util
import sys
from pathlib import Path

import numba_attention

project = "numba-attention"
author = "numba-attention developers"
version = release = numba_attention.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx_gallery.gen_gallery"]
sys.path.insert(0, str(Path(__file__).parent))  # for figures.py
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "image_scrapers": ("figures",),
    "download_all_examples": False,
    "show_memory": False,
}
html_theme = "furo"
html_title = f"numba-attention {version}"
exclude_patterns = ["build", "gallery"]
myst_heading_anchors = 3
default_role = "autolink"  # single backticks in docstrings name arguments and functions
# The bridges are documented where their libraries are not installed too.
autodoc_mock_imports = [name for name in ("jax", "torch", "transformers") if importlib.util.find_spec(name) is None]
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which the signatures cannot
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
