"""docs/troubleshooting.md: each message that it quotes is one that the sources raise."""

import functools
import re

import pytest
from support.paths import ROOT

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^`(.+)`$", TEXT, re.MULTILINE)


@functools.cache
def sources() -> str:
    """All sources, neighbouring literals joined as the compilers do, and CMake's strings too."""
    paths = [ROOT / "CMakeLists.txt"]
    tools = ("tools", "*.py"), ("tools", "*.cmake")
    for folder, pattern in (("fastcnn", "*.py"), ("csrc", "*.cpp"), ("csrc", "*.h"), *tools):
        paths += (ROOT / folder).rglob(pattern)
    return "\n".join(re.sub(r'"\s+f?"', "", path.read_text()) for path in sorted(paths))


def pattern_of(message: str) -> str:
    """Match the message with a few values or expressions in the places of its dots."""
    parts = [re.escape(part) for part in message.split("…")]
    return r"[^\n]{0,120}?".join(parts)


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 20
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_raised(message: str) -> None:
    assert re.search(pattern_of(message), sources()), message
    assert re.search(r"[a-z]{5}", message)  # not dots alone


@pytest.mark.parametrize("message", MESSAGES)
def test_cause_and_way_out_follow(message: str) -> None:
    behind = TEXT.split(f"`{message}`\n", 1)[1].lstrip("\n")
    paragraph = behind.split("\n\n")[0]
    assert not paragraph.startswith(("#", "`…"))
    assert len(paragraph) > 40
