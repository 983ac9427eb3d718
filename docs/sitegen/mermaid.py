"""Fences of Mermaid, drawn as on GitHub: pages that have one load the library, others do not."""

from html import escape
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

START = (
    "import mermaid from 'https://cdn.jsdelivr.net/npm/mermaid@11/dist/mermaid.esm.min.mjs';"
    "mermaid.initialize({startOnLoad: true});"
)
CLASS = "mermaid-figure"


class MermaidFigure(Directive):
    """Keeps a figure's source in the page, which is readable where the library cannot be loaded."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the figure."""
        source = escape("\n".join(self.content))
        block = nodes.raw("", f'<pre class="mermaid">\n{source}\n</pre>', format="html")
        return [nodes.container("", block, classes=[CLASS])]


def load_library(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Load the library on pages with a figure."""
    if doctree is not None and any(CLASS in node["classes"] for node in doctree.findall(nodes.container)):
        app.add_js_file(None, body=START, type="module")


def add_mermaid(app: Sphinx) -> None:
    """Register the fence and the library."""
    app.add_directive("mermaid", MermaidFigure)
    app.connect("html-page-context", load_library)
