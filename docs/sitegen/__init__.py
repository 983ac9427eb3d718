"""What the site has besides the pages that people write: settings, recipes and API, languages, links and figures."""

import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from sitegen.api import write_api
from sitegen.languages import add_languages
from sitegen.links import add_links
from sitegen.recipes import write_recipes
from sitegen.settings import write_settings


def setup(app: Sphinx) -> dict[str, bool]:
    """Register everything with Sphinx."""
    app.connect("builder-inited", write_pages)
    add_languages(app)
    add_links(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(app: Sphinx) -> None:
    """Write all pages that come from the code and the configurations, anew.

    Raises:
        ExtensionError: if something that needs a page is not described.
    """
    generated = Path(app.confdir) / "generated"
    shutil.rmtree(generated, ignore_errors=True)
    try:
        write_settings(generated / "settings")
        write_recipes(generated / "recipes", Path(app.srcdir) / "configs")
        write_api(generated / "api")
    except ValueError as error:
        raise ExtensionError(str(error)) from None
