"""Links that the site has beside those of the pages: to recipes, to settings, to pages below a page."""

import re
from pathlib import Path
from posixpath import normpath

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from sitegen.recipes import make_page_name
from sitegen.settings import GROUPS, TOOLS, list_names, make_anchor

NAMES = frozenset(list_names())  # now: autodoc changes the signatures that they are read from
SETTINGS = "docs/generated/settings"
ALL_SETTINGS = "\n".join(
    ["## All settings", "", "```{toctree}", ":maxdepth: 1", ""]
    + [f"/{SETTINGS}/{name}" for name in (*GROUPS, *(f"{tool}_command" for tool in TOOLS))]
    + ["```", ""]
)
BELOW = {
    "benchmarks/RESULTS": "```{toctree}\n:hidden:\n:glob:\n\nresults/*\n```\n",
    "docs/settings": ALL_SETTINGS,
}
"""Page that GitHub shows, too -> what the site adds at its end: the pages below it."""


def link_recipes(app: Sphinx, doctree: nodes.document) -> None:
    """Let links to a configuration lead to its recipe instead of a download."""
    page = app.env.docname
    for link in list(doctree.findall(addnodes.download_reference)):
        target = normpath((Path(page).parent / link["reftarget"]).as_posix())
        if target.startswith("configs/") and target.endswith(".yaml"):
            recipe = f"/docs/generated/recipes/{make_page_name(Path(target).relative_to('configs'))}"
            place = {"refdomain": "std", "reftype": "doc", "reftarget": recipe, "refdoc": page}
            link.replace_self(addnodes.pending_xref("", *link.children, refexplicit=True, refwarn=True, **place))


def link_settings(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Let a setting that is named in the text, alone or with a value, lead to its description."""
    for literal in list(doctree.findall(nodes.literal)):
        name = re.fullmatch(r"(?:--)?(\w+(?:\.\w+)+)(?:(?::| |=).*)?", literal.astext())
        is_text = not isinstance(literal.parent, (nodes.term, nodes.title, nodes.reference))
        if name and is_text and name[1] in NAMES:
            page = f"{SETTINGS}/{name[1].partition('.')[0]}"
            address = f"{app.builder.get_relative_uri(docname, page)}#{make_anchor(name[1])}"
            literal.replace_self(nodes.reference("", "", literal.deepcopy(), internal=True, refuri=address))


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put pages below a page whose own text is all that GitHub shows."""
    source[0] += f"\n{BELOW[docname]}" if docname in BELOW else ""


def add_links(app: Sphinx) -> None:
    """Register all three."""
    app.connect("source-read", add_navigation)
    app.connect("doctree-read", link_recipes, priority=400)  # before files to download are collected
    app.connect("doctree-resolved", link_settings)
