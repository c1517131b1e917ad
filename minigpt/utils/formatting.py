"""Numbers, durations and tables as people read them."""

from collections.abc import Iterable, Sequence


def format_bytes(size: float) -> str:
    """A number of bytes in decimal units: 999 bytes, 1.5 kB, 20.0 MB, 1.0 GB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def format_count(number: float) -> str:
    """A rounded count: 950, 9.5k, 2.31M."""
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """A duration as a clock shows it: h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_seconds(seconds: float) -> str:
    """A duration in the unit that suits it: 0.125 s, 3.4 min, 12.0 h, 9.5 days."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    for unit, size, limit in (("min", 60, 120), ("h", 3600, 72)):
        if seconds < size * limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:,.1f} days"


def format_flops(rate: float) -> str:
    """Floating-point operations per second in GFLOP/s or TFLOP/s."""
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: bool = False) -> str:
    """A Markdown table with padded cells, so that its columns are aligned in a terminal too.

    With `numeric`, every column but the first is aligned to the right.
    """
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    if numeric:
        rule[1:] = ["-" * (width - 1) + ":" for width in widths[1:]]
    padded = [
        [
            cell.rjust(width) if numeric and number > 0 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))
