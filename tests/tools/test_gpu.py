"""`make gpu` loses nothing: its stages, limits and files, with synthetic stages and no GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import __main__ as make_gpu, run as runs, stages, table, tune_networks
from gpu.run import Failed, Found, Run
from support.benchmark_rows import row
from support.device import HAS_GPU
from support.paths import ROOT

from fastcnn.plan import Candidate, Op, Problem

MACHINE = {"commit": "c0ffee", "device": "gpu", "driver": "1.2", "versions": {"torch": "2.11"}}


def good(run: Run) -> Found:
    assert run.execute([sys.executable, "-c", "print('a word')"]) == 0
    return {"passed": 3, "skipped": {}}


def bad(run: Run) -> Found:
    raise Failed("2 failed", {"failures": {"a::b": "assert 1 | 2"}})


def broken(run: Run) -> Found:
    return {"rows": [][0]}


SAYS_AT_THE_END = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("so far: 5")
"""


def slow(run: Run) -> Found:
    status = run.execute([sys.executable, "-c", SAYS_AT_THE_END])
    raise Failed(runs.how(status, "a sleeper"))


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Synthetic stages of each kind; the folder of their results."""
    of_kind = {"build": good, "test": bad, "sanitize": broken, "tune": slow, "step": good}
    limits = {name: 2.0 if name == "tune" else 60.0 for name in of_kind}
    monkeypatch.setattr(
        make_gpu, "STAGES", {name: (run, limits[name]) for name, run in of_kind.items()}
    )
    monkeypatch.setattr(make_gpu, "ON_REQUEST", {"bench": (good, 60.0)})
    monkeypatch.setattr(runs, "PATIENCE", 1.0)
    monkeypatch.setattr(make_gpu, "look", lambda: MACHINE)
    monkeypatch.setattr(make_gpu, "START", time.monotonic())
    monkeypatch.setattr(make_gpu, "SITE", tmp_path)
    for module in (make_gpu, runs, stages):
        monkeypatch.setattr(module, "WORK", tmp_path)
    return tmp_path / "results"


def results_in(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_a_stage_that_fails_loses_nothing(results: Path, capsys: pytest.CaptureFixture) -> None:
    assert make_gpu.main([f"{results}"]) == 1
    found = results_in(results)
    assert {name: stage["status"] for name, stage in found["stages"].items()} == {
        "build": "passed",
        "test": "failed",
        "sanitize": "failed",
        "tune": "failed",
        "step": "passed",  # and bench does not run unasked
    }
    assert found["stages"]["test"]["failures"] == {"a::b": "assert 1 | 2"}
    assert found["stages"]["sanitize"]["why"] == "IndexError: list index out of range"
    assert found["stages"]["tune"]["why"] == "a sleeper took too long"
    assert "so far: 5" in (results / "tune.log").read_text()  # interrupted, not killed
    assert "a word" in (results / "step.log").read_text()
    assert {name: found[name] for name in MACHINE} == MACHINE
    table = (results / "table.md").read_text()
    assert "| a::b | assert 1 / 2 |" in table
    assert "c0ffee" in table
    last = capsys.readouterr().out.splitlines()[-5:]  # a short table, last
    assert [line.split()[:2] for line in last][1] == ["test", "failed"]
    assert "3 passed, 0 skipped" in last[0]


def test_named_stages_keep_what_others_found(results: Path) -> None:
    assert make_gpu.main([f"{results}", "bench"]) == 0
    assert make_gpu.main([f"{results}", "build,test"]) == 1
    assert [*results_in(results)["stages"]] == ["bench", "build", "test"]


def test_results_of_another_state_are_not_mixed(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gpu.main([f"{results}", "bench"])
    monkeypatch.setattr(make_gpu, "look", lambda: {**MACHINE, "commit": "other"})
    with pytest.raises(SystemExit, match=r"expected an empty folder, .* of commit c0ffee"):
        make_gpu.main([f"{results}", "build"])
    assert [*results_in(results)["stages"]] == ["bench"]


def test_nothing_is_run_that_was_not_built(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_gpu, "SITE", results / "none")
    assert make_gpu.main([f"{results}", "bench"]) == 1
    assert "name the stage build first" in results_in(results)["stages"]["bench"]["why"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], "expected a folder"), (["x", "bulid"], "expected stages among build, .*, got bulid")],
)
def test_errors(arguments: list[str], expected: str, results: Path) -> None:
    with pytest.raises(SystemExit, match=f"^gpu: {expected}"):
        make_gpu.main(arguments)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    # As the Makefile calls it: one line that says what is missing, and no folder.
    done = subprocess.run(
        [sys.executable, "-m", "gpu", tmp_path / "results"],
        env={"PYTHONPATH": f"{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    expected = f"expected a CUDA GPU that torch {torch.__version__} can use, got none"
    assert done.stderr == f"gpu: {expected}\n"
    assert not (tmp_path / "results").exists()


def test_a_process_that_ignores_interrupts_is_killed(results: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    results.mkdir()
    run = Run(results, results / "log", time.monotonic() + 1)
    start = time.monotonic()
    assert run.execute([sys.executable, "-c", deaf]) is None
    assert time.monotonic() - start < 30


LEAVES_A_CHILD = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
time.sleep(60)
"""


def test_nothing_of_an_interrupted_process_goes_on(results: Path) -> None:
    # It would share the GPU with what is timed next.
    results.mkdir()
    run = Run(results, results / "log", time.monotonic() + 3)
    assert run.execute([sys.executable, "-c", LEAVES_A_CHILD]) is None
    child = next(line for line in run.log.read_text().splitlines() if line.isdigit())
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} goes on")


def test_all_stages_end_in_time(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Were each as late as it may be, what is given ten minutes would be killed before its end.
    monkeypatch.setattr(make_gpu, "ALL", 1.0)
    monkeypatch.setattr(make_gpu, "STAGES", {"build": (slow, 60.0)})
    start = time.monotonic()
    assert make_gpu.main([f"{results}"]) == 1
    assert time.monotonic() - start < 30
    assert results_in(results)["stages"]["build"]["why"] == "a sleeper took too long"


def test_what_is_worth_most_comes_first() -> None:
    # A GPU is there for minutes: the step and the kernels before tests, tests before tuning. All
    # of it in nine minutes, and the build with any other stage in three.
    limits = {name: limit for name, (_, limit) in stages.STAGES.items()}
    assert [*limits][:4] == ["build", "step", "memory", "test"]
    assert [*limits][-1] == "tune"
    assert sum(limits.values()) <= make_gpu.ALL == 9 * 60
    assert max(limits.values()) <= 3 * 60


SAYS_A_ROW = """
import sys, time
rows = next(a.removeprefix("--rows=") for a in sys.argv if a.startswith("--rows="))
open(rows, "w").write('{"case": "first"}\\n')
time.sleep(60)
"""


def test_what_was_measured_is_kept_at_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the results' folder, line by line, and in the stage's findings though it took too long.
    results.mkdir()
    monkeypatch.setattr(stages, "BENCHMARKS", [sys.executable, "-c", SAYS_A_ROW])
    monkeypatch.setattr(stages, "CACHE", results / "none")
    run = Run(results, results / "memory.log", time.monotonic() + 3)
    with pytest.raises(Failed, match="benchmarks took too long") as failed:
        stages.memory(run)
    assert failed.value.found["rows"] == [{"case": "first"}]
    assert (results / "memory.jsonl").read_text() == '{"case": "first"}\n'


def test_a_commit_is_named_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    monkeypatch.setenv("COMMIT", "abc")
    assert make_gpu.commit() == "abc"


TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="needs two GPUs")
def test_skipped(): pass
@pytest.fixture
def fixture(): raise ValueError("no")
def test_error(fixture): pass
"""


@pytest.mark.slow
def test_a_test_that_hangs_is_named(results: Path) -> None:
    results.mkdir()
    path = results / "test_some.py"
    path.write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_x(): pass\ndef test_hangs(): time.sleep(60)"
    )
    run = Run(results, results / "log", time.monotonic() + 20)
    found = stages.test_file(run, path)
    name = f"{results.name}/test_some.py"
    assert found["failures"][name] == f"{name} took too long"
    assert "::test_x PASSED" in run.log.read_text()
    assert "::test_hangs" in run.log.read_text()


def test_a_file_of_tests(results: Path) -> None:
    results.mkdir()
    path = results / "test_some.py"
    path.write_text(TESTS)
    assert stages.is_marked(path)
    found = stages.test_file(Run(results, results / "log", time.monotonic() + 60), path)
    by_name = {name.rpartition("::")[2]: why for name, why in found["failures"].items()}
    assert by_name == {
        "test_bad": "assert 1 == 2",
        "test_error": 'failed on setup with "ValueError: no"',
    }
    assert [*found["skipped"].values()] == ["needs two GPUs"]
    assert found["passed"] == 1
    assert "assert 1 == 2" in (results / "log").read_text()
    path.write_text("import os, pytest\npytestmark = pytest.mark.gpu\ndef test_x(): os._exit(139)")
    found = stages.test_file(Run(results, results / "log", time.monotonic() + 60), path)
    name = f"{results.name}/test_some.py"
    assert found["failures"] == {name: f"{name} ended with status 139"}
    path.write_text("import pytest\ndef test_x(): 'as pytest.mark.gpu'")  # as this file itself
    assert stages.is_marked(path)
    found = stages.test_file(Run(results, results / "log", time.monotonic() + 60), path)
    assert found == {"passed": 0, "failures": {}, "skipped": {}}


@pytest.mark.slow
def test_networks_are_met_for_tuning(capsys: pytest.CaptureFixture) -> None:
    # All but the GPU: on a CPU nothing is planned, and the table of plans is empty.
    tune_networks.main({"resnet50": (2, 32), "unet": (1, 32)}, "cpu")
    lines = capsys.readouterr().out.splitlines()
    words = [" ".join(line.split()[:2]) for line in lines[:4]]
    assert words == [
        "resnet50 inference:",
        "unet inference:",
        "resnet50 training:",
        "unet training:",
    ]
    assert len(lines) > 4


def test_candidates_are_compiled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each candidate of each problem that was met is run by one of the processes, but PyTorch's own.
    ran = []
    ways = [
        Candidate(name, lambda p, x, name=name: ran.append((p.x, name)), lambda _: None, None)
        for name in ("plain", "first", "second")
    ]
    op = Op("op", lambda p, _: (torch.ones(p.x),), None, "plain")
    op.candidates.update({way.name: way for way in ways})
    monkeypatch.setattr(tune_networks, "OPS", {"op": op})
    problems = [
        Problem("op", (n,), (1, 1, 1, 1), torch.float32, torch.device("cpu")) for n in (1, 2, 3)
    ]
    monkeypatch.setattr(tune_networks, "meet_all", lambda *_: None)
    monkeypatch.setattr(tune_networks, "met", lambda: problems)
    parts = [tune_networks.compile_part(part, 4) for part in range(4)]
    expected = [((n,), name) for n in (1, 2, 3) for name in ("first", "second")]
    assert sorted(ran) == expected
    assert sorted((p.x, name) for part in parts for p, name in part) == expected
    assert max(map(len, parts)) == 2


MEASURES = """
import json, os, pathlib, sys
if "--warm" in sys.argv:
    pathlib.Path(CHOSEN).parent.mkdir(parents=True)
    pathlib.Path(CHOSEN).touch()
    sys.exit(3)  # its errors are the timed run's as well, and are told there
assert not pathlib.Path(CHOSEN).exists()  # chosen while others were using the GPU
assert os.environ["FASTCNN_PLAN"] == "tune"
rows = next(word.partition("=")[2] for word in sys.argv if word.startswith("--rows="))
pathlib.Path(rows).write_text(json.dumps(ROW) + "\\n" + '{"file": "cut o')
sys.exit(1)
"""


def test_benchmarks_that_fail_keep_their_rows(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.mkdir()
    program = results / "measures.py"
    one = row("dropout", "training", "a", of_copy=0.7)
    chosen = results.parent / "inductor" / "ab" / "c.best_config"
    text = MEASURES.replace("ROW", repr(one)).replace("CHOSEN", repr(f"{chosen}"))
    program.write_text(text)
    monkeypatch.setattr(stages, "BENCHMARKS", [sys.executable, program])
    monkeypatch.setattr(make_gpu, "ON_REQUEST", {"bench": (stages.bench, 60.0)})
    assert make_gpu.main([f"{results}", "bench"]) == 1
    found = results_in(results)["stages"]["bench"]
    assert found["why"] == "benchmarks ended with status 1"
    assert found["rows"] == [one]
    assert found["plans"] == 0
    found["why"] = ""
    assert table.said(found) == "1 cases, 1 floors reached, 1 missed, 0 plans"
    assert "80% of copy: **missed**, 70%" in (results / "table.md").read_text()


def test_long_logs_keep_both_ends(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.mkdir()
    monkeypatch.setattr(runs, "LOG_END", 10)
    run = Run(results, results / "log", time.monotonic() + 60)
    other = run.apart("other")
    other.log.write_text("the beginning" + "x" * 1000 + "the end...")
    assert len(run.append(other)) == 1023
    kept = (results / "log").read_text()
    assert kept.startswith("the beginn\n... 1003 characters are in ")
    assert kept.endswith("...\nthe end...")
