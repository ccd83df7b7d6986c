"""One word for one thing, and it is the field's: words with a private meaning are refused."""

import re
from pathlib import Path

import pytest
from support.paths import ROOT

# What is refused, in any spelling of a name too, and what to say.
REFUSED = {
    r"cards?": "GPU or device",
    r"yard\W?stick": "baseline",
    r"twins?": "the eager baseline, a copy",
    r"afresh": "a clone without CSE; anew",
    r"whole numbers?(?! of )": "integer",
    r"raw outputs?": "convolution output",
    r"nonsense": "invalid arguments",
    r"lent": "opt-in shared memory",
    r"house": "layout",
    r"spy": "capture",
    r"kept.for.backward": "saved for backward",
    r"ask(?:s|ed|ing)?.(?:for.)?(?:it.|them.)?ahead": "prefetch",
    r"slabs?": "tile, or one-pass",
    r"two.stage": "multi-pass",
    r"finish(?:ing)?_?(?:plan|stats|reduce|parameters|channel|grid|kernel|columns)": "finalize",
    r"(?<!batch_norm_)join(?:s|ed)?.(?:stat|moment|sum|lane|split|partial)[a-z]*": "merge",
    r"made.?up": "synthetic",
    r"prov(?:e[sdn]?|ing)|proofs?": "verify, test or show",
    r"stands.in.for|stand.ins?": "fallback, emulator, in its place",
    r"rooms": "files",
    r"(?:any|some|no)body(?:'s model| asks)": "any model; a gradient is required",
    r"looks? at the data": "checks values",
    r"programs that stay": "persistent programs",
    r"way back": "backward pass",
    r"beside (?:PyTorch|eager|torch\.compile|OpenVINO|cuDNN)": "vs., compared with",
    r"kink(?:s|ed)?": "non-differentiable point, jump",
    r"rebuil(?:d|ds|t).(?:activations|in.backward|it.from)": "recompute",
}
FOLDERS = ("fastcnn", "csrc", "tests", "tools", "benchmarks", "examples", "docs", ".ci")
SUFFIXES = (".py", ".ipynb", ".cff", ".md", ".toml", ".cpp", ".h", ".cu", ".cuh", ".txt")


def texts() -> dict[str, str]:
    """All that people read, by path; not results, which say what was written then."""
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in paths
        if path.suffix in SUFFIXES and path != Path(__file__) and "results" not in path.parts
    }


@pytest.mark.parametrize("pattern", REFUSED)
def test_words_are_the_field_s(pattern: str) -> None:
    # Between letters of a name, a word ends at an underscore or where capitals begin.
    word = re.compile(rf"(?<![A-Za-z])(?i:{pattern})(?![a-z])")
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if word.search(line) or word.search(path)
    ]
    assert not found, f"say {REFUSED[pattern]}:\n" + "\n".join(found)


def test_there_are_texts() -> None:
    assert {"README.md", "fastcnn/functional.py", "csrc/common/philox.h"} <= set(texts())
