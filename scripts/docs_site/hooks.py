"""What mkdocs calls while it builds the site."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from formulas import put_in  # noqa: E402

SHIM = "https://unpkg.com/iframe-worker/shim"  # of the theme, for the search of a site on a disk
OWN = "assets/iframe-worker.js"


def on_page_content(text: str, config: Any, **_: Any) -> str:
    """The formulas of a page, before the search index is made."""
    return put_in(text, Path(config["extra"]["formulas"]))


def on_post_page(text: str, page: Any, config: Any, **_: Any) -> str:
    """The formulas of headings, which stand in the navigation too, and the own copy of the theme's script."""
    up = "../" * page.url.count("/")
    return put_in(text, Path(config["extra"]["formulas"])).replace(SHIM, up + OWN)


def on_post_template(text: str, **_: Any) -> str:
    """The page of what is not found lies at the root."""
    return text.replace(SHIM, "/" + OWN)
