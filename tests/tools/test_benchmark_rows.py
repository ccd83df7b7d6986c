"""What benchmarks compute from times, and what is said of it: all numbers here are synthetic."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import records
from gpu import benchmark_table
from support.benchmark_rows import TIMES, row


def test_a_row_s_numbers() -> None:
    row = records.measured(TIMES, 3, 10**6, images=8)
    assert row["ms"] == {"ours": 2, "ours, graph": 1, "eager": 6, "compiled": 3, "copy": 1}
    assert row["quartiles"]["ours"] == [2, 2.5]  # a quarter of the way from 2 to 4, of four times
    assert row["best"] == "compiled"
    # Round by round: the slow third one is no matter, but beside the graph, which it spared.
    assert row["speedup"]["ours"] == {"eager": 3, "compiled": 1.5}
    assert row["speedup"]["ours, graph"] == {"eager": 6, "compiled": 3}
    assert row["of_copy"] == 3 / 2 * 0.5  # 3 passes in two copies' time
    assert row["copy_gb_s"] == pytest.approx(2)  # 1 MB read and written in 1 ms
    assert row["images_per_s"]["ours"] == 4000


def test_no_floor_no_images_and_no_baseline() -> None:
    row = records.measured({"ours": [1.0, 1.0], "copy": [1.0, 1.0]}, 0, 4)
    assert row["best"] is None
    assert row["speedup"] == {"ours": {}}
    assert not {"of_copy", "images_per_s"} & set(row)


def test_rows_are_kept_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    kept = records.Records(file)
    for i in range(2):
        kept.add({"case": str(i)})
        assert json.loads(file.read_text().splitlines()[i]) == {"case": str(i)}
    records.Records(file).add({"case": "another run's"})
    assert len(file.read_text().splitlines()) == 3
    with pytest.raises(FileNotFoundError):
        records.Records(tmp_path / "no folder" / "rows.jsonl")


def without_images(file: str, test: str, case: str, **more: Any) -> dict[str, Any]:
    found = row(file, test, case, **more)
    del found["images_per_s"]
    return found


@pytest.mark.parametrize(
    ("file", "test", "case", "of_copy", "said"),
    [
        # 3x eager, 1.5x compiled, which is the best.
        ("dropout", "training", "", 0.8,
         ["80% of copy: reached, 80%", "1.2x best: reached, 1.50x"]),
        ("upsample", "doubled", "", 0.7,
         ["80% of copy: **missed**, 70%", "1.2x best: reached, 1.50x"]),
        ("upsample", "backward", "", 1,
         ["80% of copy: reached, 100%", "5x eager: **missed**, 3.00x"]),
        ("conv_bn_act", "inference", "", 0, ["1x best: reached, 1.50x"]),
        ("conv_bn_act", "training", "", 0, ["-"]),
        ("conv2d_int8", "convolutions", "", 0, ["1.2x eager: reached, 3.00x"]),
        ("networks", "training_step", "resnet50-224px-bf16", 0,
         ["1.3x eager: reached, 3.00x", "1.1x compiled: reached, 1.50x"]),
        ("networks", "training_step", "resnet50-224px-bf16-low", 0, ["-"]),
        ("networks", "training_step", "unet-256px-bf16", 0, ["1.3x eager: reached, 3.00x"]),
        ("augment", "augment", "", 0, ["-"]),
    ],
)  # fmt: skip
def test_floors(file: str, test: str, case: str, of_copy: float, said: list[str]) -> None:
    assert benchmark_table.verdict(row(file, test, case, of_copy=of_copy)) == "; ".join(said)


def test_what_was_not_measured_is_said() -> None:
    lost = row("networks", "training_step", "resnet50-224px-bf16", errors={"compiled": "x"})
    del lost["speedup"]["ours"]["compiled"]
    assert benchmark_table.verdict(lost).endswith("1.1x compiled: not measured")
    best = row("dropout", "training", "a", errors={"compiled": "x"})
    assert "1.2x best of those that ran: reached" in benchmark_table.verdict(best)


def test_a_case_that_ended_in_an_error_reaches_and_misses_nothing() -> None:
    lost = {"file": "bench_dropout", "test": "test_training", "case": "a", "error": "no memory"}
    measured = row("dropout", "training", "b", of_copy=0.9)
    said = "2 floors reached, 0 missed, 1 cases not measured"
    assert benchmark_table.tally([lost, measured]) == said


def test_the_table() -> None:
    op = without_images("dropout", "training", "small", of_copy=0.9, late={"eager": 3})
    again = {**op, "of_copy": 0.5}
    alone = without_images("dropout", "training", "alone", best=None, speedup={"ours": {}})
    step = row("networks", "training_step", "unet-256px-bf16", kept_ratio=0.7,
               peak_bytes={"ours": 2 * 10**9, "eager": 3 * 10**9})  # fmt: skip
    lost = {"error": "out of\nmemory", "device": "synthetic"}
    lost |= {"file": "bench_dropout", "test": "test_training", "case": "large"}
    late = {"skipped": "--seconds=9 were over", "device": "synthetic"}
    late |= {"file": "bench_dropout", "test": "test_training"}
    of_a_later_run = [{**late, "case": "small"}, {**late, "case": "other"}]
    text = benchmark_table.table([op, alone, step, lost, again, *of_a_later_run])
    assert text.splitlines()[0] == "synthetic:"
    (line,) = (line for line in text.splitlines() if line.startswith("| small"))  # the last run's
    assert line == (
        "| small | 2.00 (2.00 to 2.50) | 3.00 (3.00 to 3.75) | compiled | 1.50x | 50% | 2 | "
        "80% of copy: **missed**, 50%; 1.2x best: reached, 1.50x; 3 late: eager |"
    )
    assert "| alone | 2.00 (2.00 to 2.50) | - | - | - |" in text
    assert "- large: not measured: out of memory" in text
    assert "- other: not measured: --seconds=9 were over" in text
    assert "- small: not measured" not in text  # an earlier run's row stays
    ours, eager, compiled = (line for line in text.splitlines() if line.startswith("| unet"))
    assert ours.endswith("| 4000 | - | 2.00 | 0.70 | 1.3x eager: reached, 3.00x |")
    assert eager.endswith("| 1333 | 3.00x | 3.00 | - |  |")
    assert "| compiled |" in compiled


def test_a_killed_run_s_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"case": "a"}\n{"case": "b"}\n{"ca')
    assert benchmark_table.read(file) == [{"case": "a"}, {"case": "b"}]
    assert "the last row is incomplete" in capsys.readouterr().err
    file.write_text('{"case": "a"}\n')
    assert benchmark_table.read(file) == [{"case": "a"}]
    assert not capsys.readouterr().err


class Timer:
    """Late in every call of one candidate."""

    def __init__(self, slow: Callable[[], object]) -> None:
        self.late, self.slow = 0, slow

    def seconds(self, run: Callable[[], object]) -> float:
        self.late += run is self.slow
        return 0.5


def test_late_calls_are_counted_by_candidate() -> None:
    runs: dict[str, Callable[[], object]] = {"ours": lambda: 1, "eager": lambda: 2}
    late: dict[str, int] = {}
    seconds = records.counted(Timer(runs["eager"]), runs, late)
    assert [seconds(run) for run in (*runs.values(), *runs.values())] == [0.5] * 4
    assert late == {"eager": 2}
