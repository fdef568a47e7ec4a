"""The templates of the pages: every text that is put into one is escaped, and a missing one is an error."""

from __future__ import annotations

import functools

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

__all__ = ["template"]


@functools.cache
def template(name: str) -> Template:
    """The template of this file name."""
    environment = Environment(
        loader=PackageLoader("fasttrain.pages", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
