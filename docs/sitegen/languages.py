"""Two languages on one site: pages that end in `.zh-CN` are Chinese, and link to their English counterpart and back."""

from typing import Any

from sphinx.application import Sphinx

CHINESE = ".zh-CN"
HOME = "docs/index.zh-CN"
README = "README.zh-CN"


def set_language(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Say what language a page is in, and which page it is in the other one, if there is one."""
    is_chinese = pagename.endswith(CHINESE)
    counterpart = pagename.removesuffix(CHINESE) if is_chinese else pagename + CHINESE
    context["language"] = "zh-CN" if is_chinese else "en"
    context["other_language"] = ("en", "English") if is_chinese else ("zh-CN", "中文")
    context["counterpart"] = counterpart if counterpart in app.env.found_docs else None


def list_chinese_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """List all Chinese pages on the first of them, beginning with the README."""
    if docname != HOME:
        return
    pages = sorted(page for page in app.env.found_docs if page.endswith(CHINESE) and page != docname)
    entries = [f"/{page}" for page in pages if page != README]
    source[0] += "\n".join(["", "```{toctree}", ":maxdepth: 1", "", f"简介与快速开始 </{README}>", *entries, "```", ""])


def add_languages(app: Sphinx) -> None:
    """Register the languages."""
    app.connect("source-read", list_chinese_pages)
    app.connect("html-page-context", set_language)
