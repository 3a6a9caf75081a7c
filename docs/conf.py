"""Sphinx reads this; the pages themselves are put together by build_pages.py."""

import sys
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

project = "AFEN, a paper companion"
author = "The AFEN companion authors"
copyright = "2026 onwards, the AFEN companion authors"  # noqa: A001
extensions = ["myst_nb", "sphinx.ext.mathjax"]
language = "en"
nitpicky = True
exclude_patterns = ["**/.ipynb_checkpoints"]

# Notebooks are shown as they were committed; nothing is run.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_code_prompt_show = "Show code"
nb_code_prompt_hide = "Hide code"
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_dmath_double_inline = True
myst_heading_anchors = 6
myst_heading_slug_func = "stage.jupyter_slug"

# MathJax 3 comes with the Python package `mathjax` of the extra "docs".
MATHJAX = Path(next(iter(find_spec("mathjax").submodule_search_locations)))
MATHJAX /= "static/mathjax/es5"
MATHJAX_FILES = ["tex-chtml.js", "output/chtml/fonts/woff-v2"]
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}

html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme = "pydata_sphinx_theme"
html_title = "AFEN, a paper companion"
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_extra_path = [str(HERE / "_build" / "extra")]
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "logo": {"text": "AFEN"},
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 7,
    "show_nav_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "back_to_top_button": False,
}


def leave_equations_alone(app, tree):
    """Hand display equations to MathJax as written: Sphinx would nest aligned ones."""
    for node in tree.findall(nodes.math_block):
        node["no-wrap"] = True
        node.children = [nodes.Text(rf"\[{node.astext()}\]")]


def setup(app):
    app.connect("doctree-read", leave_equations_alone)
