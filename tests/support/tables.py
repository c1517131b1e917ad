"""Markdown tables in tests."""

import re


def unpadded(text: str) -> str:
    """A text in which the cells of tables have one space on each side."""
    return re.sub(" {2,}", " ", text)
