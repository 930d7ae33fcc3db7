"""Templates filled in, with all text of data, names and errors inert."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rsllm.report.tables import show


def inert_text(value: Any) -> Markup:
    """Text of which neither HTML nor Markdown makes a tag, a link or a cell."""
    if isinstance(value, Markup | Mapping):
        return Markup(value if isinstance(value, Markup) else show(value))
    return Markup(re.sub(r"[<>&\"|`\[\]\\*~]", lambda char: f"&#{ord(char[0])};", show(value)))


def render(name: str, **context: Any) -> str:
    """A template of this folder, filled in."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=inert_text,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(name).render(context)
