"""HTML pages that need no network, filled by Jinja2, which escapes every value for the place it stands in."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

_PAGES = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
# What `tojson` writes cannot end the script element it stands in, whatever texts it holds.
_PAGES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def fill_page(template: Path, **values: Any) -> str:
    """The text of a page: a template with its `policy` and these values; one that it names and lacks is an error."""
    source = template.read_text(encoding="utf-8")
    return _PAGES.from_string(source).render(policy=Markup(policy(source)), **values)  # holds hashes alone


def policy(template: str) -> str:
    """A Content-Security-Policy under which the page's own style and script run, and nothing is fetched."""
    style, script = (
        " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL))
        for tag in ("style", "script")
    )
    return f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
