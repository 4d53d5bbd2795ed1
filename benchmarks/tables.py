"""Tables in documents, made from measurements: each stands between two marks and is replaced as a whole."""

import statistics


def fill(text: str, name: str, table: str) -> str:
    """The text with the table between `<!-- begin NAME -->` and `<!-- end NAME -->` replaced.

    Raises:
        ValueError: if a mark is missing.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"The text lacks {begin} or {end}.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def mean_and_range(values: list[str], digits: int, scale: float = 1.0) -> str:
    """Mean and range of a column, or nothing where it was not measured."""
    numbers = [scale * float(value) for value in values if value]
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table with its first column on the left and all others on the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
