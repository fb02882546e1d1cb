"""Puts the table of all options into docs/options.md, made from the fields and the docstring of ``QuantConfig``."""

from __future__ import annotations

from pathlib import Path

import griffe

CONFIG = Path(__file__).parent.parent.parent / "onlinequant_backend" / "config.py"
MARKER = "<!-- the table of options -->"
_DEFAULTS = {"dataclasses.field(default_factory=dict)": "{}"}


def on_page_markdown(markdown: str, **_event: object) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace(MARKER, option_table()) if MARKER in markdown else markdown


def option_table() -> str:
    """A row for each option: name, type, default, description. Raises KeyError for an option that is not described."""
    config = griffe.visit("config", filepath=CONFIG, code=CONFIG.read_text(encoding="utf-8"))["QuantConfig"]
    described = {
        attribute.name: attribute.description
        for section in config.docstring.parse("google")
        if section.kind is griffe.DocstringSectionKind.attributes
        for attribute in section.value
    }
    options = {name: member for name, member in config.attributes.items() if not name.startswith("_")}
    if described.keys() - options.keys():
        raise KeyError(f"QuantConfig describes options that it does not have: {described.keys() - options.keys()}")
    rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, option in options.items():
        default = _DEFAULTS.get(str(option.value), str(option.value))
        kind = str(option.annotation).replace(" | ", " or ")
        meaning = " ".join(described[name].replace("``", "`").split())
        rows.append(f"| `{name}` | `{kind}` | `{default}` | {meaning} |")
    return "\n".join(rows)
