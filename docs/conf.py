"""Settings of the documentation site, which `make docs` builds from the repository's root."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

import gqaprune  # noqa: E402

project = "gqaprune"
author = "the gqaprune authors"
copyright = "the gqaprune authors, Apache-2.0"
version = release = gqaprune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sitegen"]

# The sources are where GitHub shows them, so that one relative link serves both: the root is the repository's.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/generated/**", "benchmarks/RESULTS.md", "benchmarks/results/*.md"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("docs", "benchmarks")]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

nitpicky = True
nitpick_ignore_regex = [  # names of other projects, which the build does not ask for: it needs no network
    (r"py:.*", r"(torch|transformers|peft|tokenizers|numpy|lightning|lightning_fabric|pytorch_lightning)\..*"),
    (r"py:.*", r"(collections|pathlib|os|argparse|inspect)\..*"),  # Python's own
]

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes alone: quotes stay as they are typed

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
default_role = "code"  # what single backticks mean in docstrings
napoleon_numpy_docstring = False

html_theme = "pydata_sphinx_theme"
html_title = "gqaprune"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]
templates_path = ["templates"]
html_sidebars = {page: [] for page in ("README", "CHANGELOG", "CONTRIBUTING")}  # which have no pages below them
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "gqaprune"},
    "navbar_align": "left",
    "header_links_before_dropdown": 9,
    "navbar_end": ["theme-switcher"],
    "article_header_end": ["language-switch"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
}
