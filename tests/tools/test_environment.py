"""tools/environment.py: what is there is respected, what is unchanged is not touched."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.paths import ROOT


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on an empty checkout, with pip and venv replaced by a record of their calls."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools/environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tools = ("tools/find_torch.py", "tools/choose_cuda.cmake")
    for name in ("CMakeLists.txt", *tools, "csrc/op.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    calls: list[tuple[str, ...]] = []
    site = tmp_path / "site"
    site.mkdir()

    def create(folder: Path, **_: Any) -> None:
        calls.append(("venv",))
        folder.mkdir(exist_ok=True)

    torch_of_caller = ""

    def version_of_torch(python: Path) -> str:
        if python == Path(sys.executable):
            return module.torch_of_caller
        shown = (site / "caller.pth").exists()
        return "2.13.0" if installs_torch(module) else (module.torch_of_caller if shown else "")

    def run_python(code: str) -> str:
        return "" if "find_spec" in code else str(site)

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module.venv, "create", create)
    module.real_pip, module.real_ask_index = module.pip, module.ask_index
    monkeypatch.setattr(module, "ask_index", lambda: calls.append(("ask index",)))
    # Two threads call it at once, and list.append is atomic.
    monkeypatch.setattr(module, "pip", lambda *arguments, **_: calls.append(arguments))
    monkeypatch.setattr(module, "version_of_torch", version_of_torch)
    monkeypatch.setattr(module, "run_python", run_python)
    monkeypatch.setattr(module, "toolkit", lambda: None)
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(module, "torch_has_cuda", lambda: True)
    for name in ("FASTCNN_CUDA", "FASTCNN_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["environment.py", "train"])
    module.calls, module.torch_of_caller, module.site_packages = calls, torch_of_caller, site
    return module


def installs_torch(environment: ModuleType) -> bool:
    return any(a.startswith(("torch=", "torch>")) for call in environment.calls for a in call)


BUILT = "--no-build-isolation"  # the first argument of the call that builds


def test_a_second_run_does_nothing(environment: ModuleType) -> None:
    environment.main()
    assert installs_torch(environment)
    first = len(environment.calls)
    environment.main()
    assert len(environment.calls) == first


def test_a_change_in_csrc_rebuilds_and_keeps_the_rest(environment: ModuleType) -> None:
    environment.main()
    environment.calls.clear()
    (environment.ROOT / "csrc/op.cpp").write_text("// changed")
    environment.calls.append(("torch==2.13.0",))  # installed before
    environment.main()
    assert [call[0] for call in environment.calls[1:]] == [BUILT]


def test_the_caller_s_torch_is_used_and_not_replaced(environment: ModuleType) -> None:
    environment.torch_of_caller = "2.12.1+cu130"
    environment.main()
    assert not installs_torch(environment)
    assert (environment.site_packages / "caller.pth").read_text()
    pinned = (environment.VENV / "constraints.txt").read_text()
    assert pinned == "torch==2.12.1+cu130\n"  # an extra cannot make pip replace it either


def test_a_torch_that_is_too_old_is_left_alone(environment: ModuleType) -> None:
    environment.torch_of_caller = "2.10.0"
    environment.main()
    assert installs_torch(environment)  # into .venv, which does not see the old one
    assert not (environment.site_packages / "caller.pth").exists()


def test_a_failed_build_keeps_what_was_installed(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A typo in csrc/ must not cost the next run the download of torch.
    record = environment.pip

    def fail(*arguments: str, **_: str) -> None:
        if "-e" in arguments:
            sys.exit("a compile error")
        record(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(environment, "pip", fail)
        with pytest.raises(SystemExit, match="a compile error"):
            environment.main()
    before = len(environment.calls)
    environment.main()
    assert [call[0] for call in environment.calls[before:]] == [BUILT]


def test_failed_packages_are_installed_by_the_next_run(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = environment.pip

    def fail(*arguments: str, **_: str) -> None:
        if "-c" in arguments:
            sys.exit("no such package")
        record(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(environment, "pip", fail)
        with pytest.raises(SystemExit, match="no such package"):
            environment.main()
    before = len(environment.calls)
    environment.main()
    assert sorted(call[0] for call in environment.calls[before:]) == [BUILT, "-c"]


def test_packages_are_those_of_pyproject(environment: ModuleType) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, requirements in listed["optional-dependencies"].items():
        expected = [r for r in requirements if not r.startswith("fastcnn[")]
        assert environment.requirements(extra) == expected
    # `dev` installs all that its own entry names.
    named = set(listed["optional-dependencies"]["dev"]) - set(environment.requirements("dev"))
    extras = ",".join(extra for extra in ("train", "bench") if extra in environment.EXTRAS["dev"])
    assert named == {f"fastcnn[{extras}]"}


def test_dev_after_train_adds_its_packages_and_train_after_dev_nothing(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.main()
    before = len(environment.calls)
    monkeypatch.setattr(sys, "argv", ["environment.py", "dev"])
    environment.main()
    assert ("ask index",) not in environment.calls[before:]  # all may be there already
    (packages,) = [call for call in environment.calls[before:] if call[0] == "-c"]
    assert {"matplotlib", "pytest"} < set(packages)
    before = len(environment.calls)
    monkeypatch.setattr(sys, "argv", ["environment.py", "train"])
    environment.main()
    assert len(environment.calls) == before


def test_dev_builds_cuda_kernels_wherever_nvcc_is(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environment.build_options(dev=True) == {}
    monkeypatch.setattr(environment, "toolkit", lambda: "/cuda/bin/nvcc")
    assert environment.build_options(dev=False) == {}  # CMakeLists.txt asks for a GPU
    one = {"FASTCNN_CUDA": "ON", "FASTCNN_CUDA_ARCHS": "90"}
    assert environment.build_options(dev=True) == one
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    assert environment.build_options(dev=True) == {"FASTCNN_CUDA": "ON"}  # for that GPU
    monkeypatch.setenv("FASTCNN_CUDA", "OFF")
    assert environment.build_options(dev=True) == {}


def test_a_build_without_the_cuda_kernels_that_nvcc_could_compile_is_said(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "toolkit", lambda: "/cuda/bin/nvcc")
    environment.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "for the CPU" in line]
    assert "no GPU" in line
    assert "FASTCNN_CUDA=ON" in line
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    assert environment.cpu_only({}) == ""
    monkeypatch.setattr(environment, "torch_has_cuda", lambda: False)
    assert "for the CPU: torch was built without CUDA (FASTCNN_CUDA=ON" in environment.cpu_only({})
    assert environment.cpu_only({"FASTCNN_CUDA": "auto"}) == environment.cpu_only({}) != ""
    # Silent where they are compiled, and where the user has decided.
    assert environment.cpu_only({"FASTCNN_CUDA": "ON"}) == ""
    monkeypatch.setenv("FASTCNN_CUDA", "OFF")
    assert environment.cpu_only({}) == ""


def test_somebody_else_s_venv_is_not_deleted(environment: ModuleType) -> None:
    environment.VENV.mkdir()
    with pytest.raises(SystemExit, match="move it away"):
        environment.main()
    assert environment.calls == []


def test_only_build_options_cause_a_rebuild(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = environment.fingerprint({})
    monkeypatch.setenv("FASTCNN_CPU_CAPABILITY", "avx2")  # an option of the run
    assert environment.fingerprint({}) == key
    monkeypatch.setenv("FASTCNN_CUDA", "OFF")
    assert environment.fingerprint({}) != key
    monkeypatch.delenv("FASTCNN_CUDA")
    assert environment.fingerprint({"FASTCNN_CUDA": "ON"}) != key
    monkeypatch.setattr(environment, "has_gpu", lambda: True)  # one was put in
    assert environment.fingerprint({}) != key


@pytest.mark.parametrize(
    ("stamp", "message"), [(None, "move it away"), ('{"root": null}', "deactivate it")]
)
def test_an_active_venv_that_is_not_ready_is_not_deleted_under_our_feet(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, stamp: str | None, message: str
) -> None:
    # Somebody else's, or ours whose making was interrupted: the script runs on its Python.
    environment.VENV.mkdir()
    if stamp is not None:
        (environment.VENV / environment.STAMP).write_text(stamp)
    monkeypatch.setattr(sys, "prefix", str(environment.VENV))
    with pytest.raises(SystemExit, match=message):
        environment.main()
    assert environment.calls == []


def test_a_wheel_s_environment_has_what_building_takes_and_nothing_else(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["environment.py", "wheel"])
    environment.main()
    installed = {argument for call in environment.calls[2:] for argument in call}
    assert installed == {"--no-deps", environment.TORCH_CPU, *environment.BUILD}
    first = len(environment.calls)
    environment.main()
    assert len(environment.calls) == first
    # The others go on from there.
    monkeypatch.setattr(sys, "argv", ["environment.py", "train"])
    environment.main()
    assert sorted(call[0] for call in environment.calls[first:]) == [BUILT, "-c"]


def test_an_older_python_says_so() -> None:
    # It must be able to read the file, and come as far as the sentence.
    path = ROOT / "tools/environment.py"
    ast.parse(path.read_text(), feature_version=(3, 7))
    code = f"import sys; sys.version_info = (3, 7, 17); exec(open({str(path)!r}).read())"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert (
        done.stderr == f"environment: expected Python 3.10 or later, got {sys.version.split()[0]}\n"
    )
    before = path.read_text().partition("if sys.version_info")[0]
    imports = [node for node in ast.walk(ast.parse(before)) if isinstance(node, ast.Import)]
    assert [name.name for node in imports for name in node.names] == ["sys"]
    assert "ImportFrom" not in ast.dump(ast.parse(before))


def fake_pip(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a script be .venv's pip."""
    environment.VENV.mkdir(exist_ok=True)
    command = [sys.executable, "-S", "-u", "-c", f"import os, sys, time\n{code}"]
    monkeypatch.setattr(environment, "pip_command", lambda verb: [*command, verb])


DOWNLOADS = "Downloading https://index/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (873.2 MB)"


def test_what_pip_does_is_shown(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "Collecting torch==2.13.0",
        "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl.metadata (30 kB)",
        f"  {DOWNLOADS}",
        "  Downloading mpmath-1.3.0-py3-none-any.whl",
        "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'",
        f"Installing collected packages: {', '.join('abcdefghij')}",
    ]
    fake_pip(environment, monkeypatch, f"print({chr(10).join(lines)!r})")
    environment.real_pip("torch")
    assert capsys.readouterr().out.splitlines() == [
        "environment: downloading torch-2.13.0%2Bcpu (873.2 MB)",
        "environment: downloading mpmath-1.3.0 (of unknown size)",
        f"environment: {lines[4]}",
        "environment: installing a, b, c, d, e, f, g, h and more",
    ]


def test_a_download_that_stands_still_is_stopped(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "STUCK", 1)
    fake_pip(environment, monkeypatch, f"print({DOWNLOADS!r}); time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        environment.real_pip("torch")
    assert time.monotonic() - started < 30
    assert DOWNLOADS in str(stopped.value)  # what pip said
    assert "no byte of torch-2.13.0%2Bcpu came for 1 s: stopped" in str(stopped.value)


@pytest.mark.parametrize(
    "doing", [DOWNLOADS, "Building wheel for fastcnn (pyproject.toml): started"]
)
def test_a_slow_download_and_a_long_build_are_not_stopped(
    environment: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    doing: str,
) -> None:
    monkeypatch.setattr(environment, "STUCK", 3)
    monkeypatch.setattr(environment, "TOLD", 1)
    writes = "    if 'Downloading' in sys.argv[-2]: file.write(b'0' * 1000000); file.flush()\n"
    code = (
        "open(os.environ['TMPDIR'] + '/larger.whl', 'wb').write(b'0' * 10**8)\n"  # came before
        f"print({doing!r})\nfile = open(os.environ['TMPDIR'] + '/torch.whl', 'wb')\n"
        "for _ in range(45):\n    time.sleep(0.1)\n"
        f"{writes if doing == DOWNLOADS else ''}"
    ).replace("if 'Downloading' in sys.argv[-2]: ", "")
    fake_pip(environment, monkeypatch, code)
    environment.real_pip("torch")
    told = capsys.readouterr().out
    assert (" MB came" in told) == (doing == DOWNLOADS)
    assert "100 MB came" not in told  # its own bytes
    assert not [path for path in environment.VENV.iterdir() if path.is_dir()]


def test_no_index_is_one_sentence_in_seconds(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = [sys.executable, "-m", "pip"]
    monkeypatch.setattr(environment, "pip_command", lambda verb: [*pip, verb])
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # the port that discards
    }.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        environment.real_ask_index()
    assert time.monotonic() - started < 30
    (said,) = str(stopped.value).splitlines()
    assert f"expected {environment.BUILD[0]} from a package index, asked http://127.0.0.1:9" in said
    assert "PIP_INDEX_URL" in said
    assert "refused" in said  # pip's reason


def test_pip_is_not_used_before_an_index_has_answered(environment: ModuleType) -> None:
    environment.main()
    assert [call[0] for call in environment.calls[:2]] == ["venv", "ask index"]
