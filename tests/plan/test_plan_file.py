"""The plan file: whole whatever happens to it, and shared by processes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.adopt import MEASURED, adopt
from support.paths import TESTS
from support.plan_cases import H200, Clock, candidate, planner, problem

import fastcnn
from fastcnn.plan import plan_file
from fastcnn.plan.environment import environment_of, hash_of
from fastcnn.plan.plan_file import Entry, PlanFile, folder

ENTRY = Entry("a", {"a": 1.0, "b": 2.0}, {"c": "wrong"})


def new(where: Path | None, **others: str) -> PlanFile:
    file = PlanFile(where, {**environment_of(H200), **others})
    file.reload()
    return file


def test_what_is_kept_is_read(tmp_path: Path) -> None:
    where = tmp_path / "not" / "there"
    file = new(where)
    assert not file.entries
    assert file.keep("p", ENTRY) == ENTRY
    assert new(where).entries == {"p": ENTRY}
    # The name tells people the device, and only the file and its lock are left.
    assert file.path is not None
    assert file.path.name.startswith("NVIDIA-H200-sm_90-")
    assert {path.suffix for path in where.iterdir()} == {".json", ".lock"}


def test_plan_files_become_default_plans(tmp_path: Path) -> None:
    # Of two runs: what only the first met stays, what both met is the second's.
    measured = tmp_path / "measured.json"
    measured.write_text('{"schema": 1, "environment": {}, "plans": {}}')
    for run, entries in enumerate(({"p": ENTRY, "q": ENTRY}, {"q": ENTRY._replace(plan="b")})):
        file = new(tmp_path / f"{run}")
        for key, entry in entries.items():
            file.keep(key, entry)
        assert file.path is not None
        assert adopt(file.path, measured) == 2
    found = plan_file.parse(measured.read_bytes(), {})
    assert found == {"p": ENTRY, "q": ENTRY._replace(plan="b")}
    plan_file.parse(MEASURED.read_bytes(), {})  # what comes with the package, at its place
    measured.write_text('{"schema": 0, "plans": {}}')
    with pytest.raises(ValueError, match="expected schema 0, got 1"):
        adopt(file.path, measured)


ENVIRONMENT = ["device", "driver", "torch", "triton", "fastcnn", "kernels"]


@pytest.mark.parametrize("what", ENVIRONMENT)
def test_an_outdated_file_is_never_read(what: str, tmp_path: Path) -> None:
    assert list(environment_of(H200)) == ENVIRONMENT
    old = new(tmp_path, **{what: "another"})
    old.keep("p", ENTRY)
    file = new(tmp_path)
    assert not file.entries
    file.keep("q", ENTRY)
    assert new(tmp_path, **{what: "another"}).entries == {"p": ENTRY}  # nor written


def test_changed_kernels_have_another_hash(tmp_path: Path) -> None:
    def hashed(**files: str) -> str:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "compiled.pyc").write_text(str(files))  # comes and goes by itself
        return hash_of(tmp_path)

    first = hashed(a="x", b="y")
    assert hashed(b="y", a="x") == first
    changes: list[dict[str, str]] = [
        {"a": "x", "b": "z"}, {"a": "x", "c": "y"}, {"a": "xy", "b": ""}, {"a": "y", "b": "x"},
        {"a": "x"}, {"a": "x", "b": "y", "c": ""}, {},
    ]  # fmt: skip
    assert len({first, *(hashed(**files) for files in changes)}) == 1 + len(changes)
    # The one of this checkout is of its own kernels.
    triton = Path(fastcnn.__file__).with_name("triton")
    assert (triton / "conv2d_kernels.py").exists()
    assert environment_of(H200)["kernels"] == hash_of(triton)


def damages() -> dict[str, bytes]:
    def changed(**change: object) -> bytes:
        content = {"schema": 1, "environment": environment_of(H200), "plans": {}}
        return json.dumps({**content, **change}).encode()

    whole = changed(plans={"p": ENTRY._asdict()})
    entries: dict[str, object] = {
        "no_times": {"plan": "a", "refused": {}},
        "no_object": 3,
        "untimed": {"plan": "b", "milliseconds": {"a": 1.0}, "refused": {}},
        "infinite": {"plan": "a", "milliseconds": {"a": float("inf")}, "refused": {}},
        "negative": {"plan": "a", "milliseconds": {"a": -1.0}, "refused": {}},
        "reason": {"plan": "a", "milliseconds": {"a": 1.0}, "refused": {"b": 3}},
        "times_list": {"plan": "a", "milliseconds": ["a"], "refused": {}},
        "extra": {**ENTRY._asdict(), "more": 1},
    }
    return {
        "empty": b"", "truncated": whole[:-20], "zeros": bytes(4096), "not_json": b"plan: a\n",
        "not_utf8": b'{"\xff": 1}', "nested": b"[" * 100_000, "list": b"[]",
        "schema": changed(schema=2), "environment": changed(environment={}),
        "plans": changed(plans=[]),
        **{name: changed(plans={"p": entry}) for name, entry in entries.items()},
    }  # fmt: skip


@pytest.mark.parametrize("name", damages())
def test_a_damaged_file_is_rebuilt(name: str, tmp_path: Path) -> None:
    path = new(tmp_path).path
    assert path is not None
    path.write_bytes(damages()[name])
    with pytest.warns(
        UserWarning, match=f"{path}: damaged .*: moved to {path.name}.damaged"
    ) as seen:
        file = new(tmp_path)
    assert len(seen) == 1
    assert not file.entries
    assert path.with_name(path.name + ".damaged").read_bytes() == damages()[name]
    file.keep("p", ENTRY)
    assert new(tmp_path).entries == {"p": ENTRY}


def test_damaged_after_it_was_read(tmp_path: Path) -> None:
    file = new(tmp_path)
    assert file.path is not None
    file.keep("p", ENTRY)
    file.path.write_bytes(b"{")
    with pytest.warns(UserWarning, match="damaged"):
        file.keep("q", ENTRY)
    assert file.entries == {"p": ENTRY, "q": ENTRY}


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = new(tmp_path)
    file.keep("p", ENTRY)

    # chmod would not stop root, whom CI runs as.
    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", read_only)
    clock = Clock()
    ways = [candidate("a", clock, 2.0), candidate("b", clock, 1.0)]
    plans = planner("tune", clock, tmp_path, *ways)
    with pytest.warns(
        UserWarning, match="cannot be written .*Read-only.*: plans are kept in this"
    ) as w:
        chosen = [plans.choose(problem(i)).name for i in (1, 2)]
    assert chosen == ["b", "b"]
    assert len(w) == 1  # once
    assert plans.choose(problem(1)).source == "tuned"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}  # no remains


def test_no_folder_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"cannot be read .*Not a directory"):
        file = new(tmp_path / "file" / "plans")
    file.keep("p", ENTRY)  # it was said once
    assert file.entries == {"p": ENTRY}
    nowhere = new(None)
    with pytest.warns(UserWarning, match="neither FASTCNN_CACHE nor a home folder"):
        nowhere.keep("p", ENTRY)
    assert nowhere.entries == {"p": ENTRY}


def test_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCNN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("", "relative"):  # the specification has a relative one ignored
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert folder() == tmp_path / ".cache" / "fastcnn" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folder() == Path("/x/fastcnn/plans")
    monkeypatch.setenv("FASTCNN_CACHE", "/c")
    assert folder() == Path("/c/plans")


def test_who_tunes_second_runs_the_same(tmp_path: Path) -> None:
    # Both read before either wrote; the later one measured otherwise, and takes over what is there.
    first, second = new(tmp_path), new(tmp_path)
    assert first.keep("p", ENTRY) == ENTRY
    other = Entry("b", {"a": 2.0, "b": 1.0}, {"c": "wrong"})
    assert second.keep("p", other) == ENTRY
    # With a candidate more it knows better.
    more = Entry("d", {"a": 2.0, "b": 1.0, "d": 0.5}, {"c": "wrong"})
    assert second.keep("p", more) == more
    assert new(tmp_path).entries == {"p": more}


PROCESS = """
import sys, time
from pathlib import Path
from support.plan_cases import Clock, candidate, planner, problem

me, where, n = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
clock = Clock()
ways = [candidate("slow", clock, 2.0), candidate("fast", clock, 1.0)]
plans = planner("tune", clock, where / "plans", *ways)
(where / f"ready{me}").touch()
while not (where / "go").exists():
    time.sleep(0.001)
for i in range(n):  # every third problem is everybody's
    assert plans.choose(problem(i if i % 3 == 0 else (me + 1) * n + i)).name == "fast"
"""


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_tune_at_once(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 60
    # Without locks: what is written may be overwritten, but every file read is whole (no warning,
    # which would end the process).
    code = PROCESS if locks else "import fastcnn.plan.plan_file as f; f.fcntl = None" + PROCESS
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", code, str(i), str(tmp_path), str(n)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        assert all(process.poll() is None for process in processes)
    (tmp_path / "go").touch()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    (path,) = (tmp_path / "plans").glob("*.json")
    content = json.loads(path.read_bytes())
    own = 2 * sum(i % 3 != 0 for i in range(n))
    if locks:
        assert len(content["plans"]) == own + n // 3
    assert all(entry["plan"] == "fast" for entry in content["plans"].values())
    assert {path.suffix for path in path.parent.iterdir()} == {".json", ".lock"}


def test_a_lock_that_a_disk_does_not_offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    assert plan_file.fcntl is not None
    monkeypatch.setattr(plan_file.fcntl, "flock", no_locks)
    new(tmp_path).keep("p", ENTRY)
    assert new(tmp_path).entries == {"p": ENTRY}
