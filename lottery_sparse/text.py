"""Text that came from a file, made fit for a terminal and for an error message."""

from __future__ import annotations

MOST = 200  # characters


def shown(value: object, most: int = MOST) -> str:
    """One line of printable characters: the text, or what repr gives of another value.

    A text with control characters, line ends or terminal escapes is written as repr writes it, so
    that a file can neither fake lines nor move the cursor. Longer ones lose their end, and say so.
    """
    text = value if isinstance(value, str) else repr(value)
    left = len(text) - most
    text = text[:most]
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if left <= 0 else f"{text}… ({left:,} more characters)"
