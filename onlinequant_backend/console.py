"""Text for consoles and files of any encoding: Windows' often know a few hundred characters only."""

from __future__ import annotations

import codecs
from typing import IO

from rich.box import Box

# rich's ``SIMPLE_HEAD`` in ASCII.
SIMPLE_HEAD = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_REPLACEMENTS = "onlinequant.replacements"
_ASCII = {"─": "-", "━": "-", "…": "...", "·": "|"}


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in lost), error.end


codecs.register_error(_REPLACEMENTS, _replaced)


def accept_any_text(stream: IO[str] | None) -> None:
    """Have a stream write other characters for those that its encoding lacks, instead of raising an error."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors=_REPLACEMENTS)


def encodable(text: str, stream: IO[str]) -> str:
    """``text`` with other characters for those that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, _REPLACEMENTS).decode(encoding)
