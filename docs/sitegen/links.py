"""Links that the site has beside those of the pages: to recipes, to settings, to pages below a page."""

import re
from functools import cache
from pathlib import Path
from posixpath import normpath

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from sitegen.recipes import make_page_name
from sitegen.settings import GROUPS, TOOLS, list_names, make_anchor

BELOW = {
    "benchmarks/RESULTS": ("results/*",),
    "docs/settings": (
        *(f"generated/settings/{name}" for name in GROUPS),
        *(f"generated/settings/{name}_command" for name in TOOLS),
    ),
}
"""Page that GitHub shows, too -> pages below it, or patterns of their names."""


def link_recipes(app: Sphinx, doctree: nodes.document) -> None:
    """Let links to a configuration lead to its recipe instead of a download."""
    page = app.env.docname
    for link in list(doctree.findall(addnodes.download_reference)):
        target = normpath((Path(page).parent / link["reftarget"]).as_posix())
        if target.startswith("configs/") and target.endswith(".yaml"):
            recipe = f"/docs/generated/recipes/{make_page_name(Path(target).relative_to('configs'))}"
            link.replace_self(_make_reference(page, "doc", recipe, *link.children))


def link_settings(app: Sphinx, doctree: nodes.document) -> None:
    """Let a setting that is named in the text, alone or with a value, lead to its description."""
    for literal in list(doctree.findall(nodes.literal)):
        name = re.fullmatch(r"(?:--)?(\w+(?:\.\w+)+)(?:(?::| |=).*)?", literal.astext())
        is_text = not isinstance(literal.parent, (nodes.term, nodes.title, nodes.reference, addnodes.pending_xref))
        if name and is_text and name[1] in _get_settings():
            literal.replace_self(_make_reference(app.env.docname, "ref", make_anchor(name[1]), literal.deepcopy()))


@cache
def _get_settings() -> frozenset[str]:
    return frozenset(list_names())


def _make_reference(page: str, kind: str, target: str, *content: nodes.Node) -> addnodes.pending_xref:
    return addnodes.pending_xref(
        "", *content, refdomain="std", reftype=kind, reftarget=target, refdoc=page, refexplicit=True, refwarn=True
    )


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put pages below a page whose own text is all that GitHub shows."""
    if docname in BELOW:
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", ":glob:", "", *BELOW[docname], "```", ""])


def add_links(app: Sphinx) -> None:
    """Register all three."""
    app.connect("doctree-read", link_recipes, priority=400)  # before files to download are collected
    app.connect("doctree-read", link_settings)
    app.connect("source-read", add_navigation)
