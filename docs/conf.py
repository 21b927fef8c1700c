"""Sphinx: the pages in Markdown, the reference from the docstrings."""

import importlib.util

import numba_attention

project = "numba-attention"
author = "numba-attention developers"
version = release = numba_attention.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
html_theme = "furo"
html_title = f"numba-attention {version}"
exclude_patterns = ["build"]
myst_heading_anchors = 3
default_role = "autolink"  # single backticks in docstrings name arguments and functions
# The bridges are documented where their libraries are not installed too.
autodoc_mock_imports = [name for name in ("jax", "torch", "transformers") if importlib.util.find_spec(name) is None]
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which the signatures cannot
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
