"""Writes the parts of a document that a script makes, each between two marks of its own."""

from pathlib import Path


def write_between(file: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between the marks in a file."""
    before, rest = file.read_text().split(begin)
    file.write_text(f"{before}{begin}{text}{end}{rest.split(end)[1]}")
