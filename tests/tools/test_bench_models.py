"""make bench-models: every column of a small network runs, and the table shows losses first."""

import json
from pathlib import Path

import foreign_networks
import models
import pytest
from support.conversion_cases import cbr
from torch import nn

TINY = foreign_networks.Network(
    lambda: nn.Sequential(nn.Conv2d(3, 4, 1), cbr(nn.ReLU()), nn.Flatten(), nn.Linear(256, 3)),
    size=8,
    batch=2,
)


@pytest.mark.filterwarnings("ignore")  # of torch.jit.trace, which is OpenVINO's way in
def test_each_column_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(foreign_networks.NETWORKS, "tiny", TINY)
    file = tmp_path / "found.json"
    models.one(file, "tiny", quick=True)
    models.one(file, "tiny", quick=True)
    found = json.loads(file.read_text())
    cases = [(row["what"], row["dtype"]) for row in found["rows"]]
    assert cases == models.COLUMNS * 2
    for row in found["rows"]:
        beside = {"OpenVINO"} if row["what"] == "inference" else set()
        assert set(row["ms"]) == {"ours", "eager", *beside}
    assert all(row["speedup"]["eager"] > 0 for row in found["rows"])


def test_the_table_shows_losses_first() -> None:
    def row(network: str, dtype: str, **speedup: float) -> models.Row:
        return {"network": network, "what": "inference", "dtype": dtype, "speedup": speedup}

    rows = [row("a", "bf16", eager=4.0), row("a", "fp32", eager=1.0, OpenVINO=2.0)]
    rows += [row("b", "bf16", eager=0.96), row("b", "fp32", eager=4.0)]
    here = dict.fromkeys(("processor", "instructions", "threads", "torch", "date"), "here")
    _, *lines = models.table({**here, "rows": rows}).splitlines()
    assert [line.split() for line in lines] == [
        ["infer", "bf16", "infer", "fp32", "infer", "fp32"],
        ["network", "vs.", "eager", "vs.", "eager", "vs.", "OpenVINO"],
        ["b", "(a", "loss)", "0.96", "4.00", "-"],
        ["a", "4.00", "1.00", "2.00"],
        ["geometric", "mean", "1.960", "2.000", "2.000"],
    ]
