"""What the pages that lm_jax writes share: each is one HTML file that asks for nothing else.

A package with a page has page.html, page.css and page.js. Their common style is page.css beside
this file.
"""

import importlib.resources
import json
import re
from typing import Any


def assemble(package: str, data: Any, **contents: str) -> str:
    """The page of a package: its page.html, where STYLE, SCRIPT, DATA and the names in `contents`
    stand for what belongs there, each as /* NAME */.

    Args:
      data: for the script; what JSON has, without NaN and infinity. Text in it is safe there, and
        the script puts it on the page as text.
      contents: HTML, in which whatever is not ours is escaped.

    Raises:
      KeyError: the page names something that is not given.
    """
    style = _asset("lm_jax", "page.css") + _asset(package, "page.css")
    # In a script element, text ends at '</script' alone, and '<!--' changes how it is read.
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"STYLE": style, "SCRIPT": _asset(package, "page.js"), "DATA": content} | contents
    # At once: what is put in is not searched for names again.
    return re.sub(r"/\* ([A-Z]+) \*/", lambda m: parts[m[1]], _asset(package, "page.html"))


def _asset(package: str, file: str) -> str:
    return importlib.resources.files(package).joinpath(file).read_text(encoding="utf-8")
