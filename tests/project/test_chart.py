"""The chart, README's table and docs/performance.md hold the same numbers."""

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import chart
import pytest
from support.paths import ROOT

FOUND = json.loads(chart.RESULTS.read_text())
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()


def ident(row: dict[str, Any]) -> str:
    return chart.named(row)


@pytest.mark.parametrize("row", FOUND["rows"], ids=ident)
def test_results_are_those_of_the_documentation(row: dict[str, Any]) -> None:
    # In one paragraph or one line of a table, whichever: all of a row's numbers together.
    numbers = [f"{ms:g}" for ms in row["ms"].values()]
    places = [*PERFORMANCE.splitlines(), *PERFORMANCE.split("\n\n")]
    assert [place for place in places if all(re.search(rf"\b{n}\b", place) for n in numbers)]
    assert f"batch {row['batch']}" in PERFORMANCE or f"({row['batch']} x 3" in PERFORMANCE
    if "saved" in row:
        assert re.search(rf"\b{row['saved']:.2f}\b", PERFORMANCE)
    assert FOUND["date"] in PERFORMANCE
    assert FOUND["torch"] in PERFORMANCE


@pytest.mark.parametrize("row", FOUND["rows"], ids=ident)
def test_speedups_fit_the_times(row: dict[str, Any]) -> None:
    # The best of the others has the rounds' median ratio: 3 % from the medians' at most, which a
    # slow spell of the machine would not keep. The others' are the ratio of the medians itself.
    ours = row["ms"]["fastcnn"]
    assert set(row["speedup"]) == set(row["ms"]) - {"fastcnn"}
    best = min(row["speedup"], key=lambda other: row["ms"][other])
    for other, speedup in row["speedup"].items():
        of_medians = row["ms"][other] / ours
        slack = 0.03 * of_medians if other == best else 0.0
        assert abs(speedup - of_medians) <= slack + 0.005


def test_readme_has_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert chart.BEGIN + chart.table(FOUND) + chart.END in readme, "run make chart"
    for row in FOUND["rows"]:
        assert f"| {chart.named(row)} |" in readme


def test_the_chart_shows_the_table_and_its_conditions() -> None:
    texts = [
        (element.text or "").strip()
        for element in ElementTree.parse(chart.CHART).iter()
        if element.tag.endswith("}text")
    ]
    for row in FOUND["rows"]:
        name = f"{chart.named(row)}"
        assert name in texts
        assert chart.sized(row) in texts
    speeds = [f"{row['speedup']['eager']:.2f}x" for row in FOUND["rows"]]
    saved = [f"{row['saved']:.2f}x" for row in FOUND["rows"] if "saved" in row]
    # In the rows' order, and nothing else.
    assert [text for text in texts if re.fullmatch(r"\d\.\d\dx", text)] == speeds + saved
    for line in chart.conditions(FOUND):
        assert line in texts
    for condition in ("processor", "torch", "date"):
        assert any(FOUND[condition] in text for text in texts)
