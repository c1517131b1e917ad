"""Laws of formatted text: tables are aligned and keep their cells."""

import re

import pytest

from minigpt.utils.formatting import markdown_table

HEAD = ("model", "loss", "n")
ROWS = [("a|b", "3.25", "12,345"), ("a much longer name", "10.5", "7")]


@pytest.mark.parametrize("numeric", [False, True])
def test_a_table_is_aligned_and_keeps_its_cells(numeric: bool) -> None:
    lines = markdown_table(HEAD, ROWS, numeric).splitlines()
    borders = [[match.start() for match in re.finditer(r"(?<!\\)\|", line)] for line in lines]
    assert all(positions == borders[0] for positions in borders)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert [[cell.replace("\\|", "|") for cell in row] for row in cells[2:]] == [list(row) for row in ROWS]
    assert all(
        re.fullmatch(r"-{2,}:" if numeric and column else r"-{3,}", cell) for column, cell in enumerate(cells[1])
    )
