"""Write the table of docs/conversion.md anew: what convert fuses in models of other packages.

.venv/bin/python tools/conversion_table.py
"""

import pathlib
import sys

from between_marks import write_between

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.conversion_models import HEADER, NAMES, line  # noqa: E402

FILE = ROOT / "docs" / "conversion.md"
BEGIN, END = "<!-- table: tools/conversion_table.py -->\n", "<!-- end of the table -->"


def main() -> None:
    """Replace what is between the marks."""
    write_between(FILE, BEGIN, END, "\n".join([HEADER, *map(line, NAMES), ""]))


if __name__ == "__main__":
    main()
