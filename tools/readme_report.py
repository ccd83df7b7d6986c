"""Write README's example of fastcnn.report anew: what it prints of a small U-Net.

.venv/bin/python tools/readme_report.py
"""

import contextlib
import io
import pathlib
from unittest.mock import patch

import torch
from between_marks import write_between

import fastcnn
from fastcnn import _C

FILE = pathlib.Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- report: tools/readme_report.py -->\n", "<!-- end of the report -->"


def main() -> None:
    """Replace what is between the marks."""
    write_between(FILE, BEGIN, END, block())


def block() -> str:
    """Return what report prints, as Markdown."""
    printed = io.StringIO()
    model = fastcnn.create_model("unet", depth=1).to(memory_format=torch.channels_last)
    # On any processor.
    here = patch.object(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    fast = patch.object(_C, "has_fast_bf16", lambda: True)
    with contextlib.redirect_stdout(printed), here, fast:
        fastcnn.report(model)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return "\n".join(["```", *lines, "```"]) + "\n"


if __name__ == "__main__":
    main()
