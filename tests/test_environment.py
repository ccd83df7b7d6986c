"""tools/environment.py: what is there is respected, what is unchanged is not touched."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on an empty checkout, with pip and venv replaced by a record of their calls."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools/environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "CMakeLists.txt", "tools/find_torch.py", "csrc/op.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
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
        installed = any(call[0].startswith("torch") for call in calls)
        return "2.13.0" if installed else (module.torch_of_caller if shown else "")

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module.venv, "create", create)
    monkeypatch.setattr(module, "pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(module, "version_of_torch", version_of_torch)
    monkeypatch.setattr(module, "run_python", lambda code: str(site))
    monkeypatch.setattr(sys, "argv", ["environment.py", "train"])
    module.calls, module.torch_of_caller, module.site_packages = calls, torch_of_caller, site
    return module


def installs_torch(environment: ModuleType) -> bool:
    return any(call[0].startswith("torch") for call in environment.calls)


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
    environment.calls.append(("torch, installed before",))
    environment.main()
    assert [call[0] for call in environment.calls[1:]] == ["--no-build-isolation"]


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

    def fail(*arguments: str) -> None:
        if "-e" in arguments:
            sys.exit("a compile error")
        record(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(environment, "pip", fail)
        with pytest.raises(SystemExit, match="a compile error"):
            environment.main()
    before = len(environment.calls)
    environment.main()
    assert [call[0] for call in environment.calls[before:]] == ["--no-build-isolation"]


def test_somebody_else_s_venv_is_not_deleted(environment: ModuleType) -> None:
    environment.VENV.mkdir()
    with pytest.raises(SystemExit, match="move it away"):
        environment.main()
    assert environment.calls == []


def test_only_build_options_cause_a_rebuild(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = environment.fingerprint()
    monkeypatch.setenv("FASTCNN_CPU_CAPABILITY", "avx2")  # an option of the run
    assert environment.fingerprint() == key
    monkeypatch.setenv("FASTCNN_CUDA", "OFF")
    assert environment.fingerprint() != key


@pytest.mark.parametrize(
    ("stamp", "words"), [(None, "move it away"), ('{"root": null}', "deactivate it")]
)
def test_an_active_venv_that_is_not_ready_is_not_deleted_under_our_feet(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, stamp: str | None, words: str
) -> None:
    # Somebody else's, or ours whose making was interrupted: the script runs on its Python.
    environment.VENV.mkdir()
    if stamp is not None:
        (environment.VENV / environment.STAMP).write_text(stamp)
    monkeypatch.setattr(sys, "prefix", str(environment.VENV))
    with pytest.raises(SystemExit, match=words):
        environment.main()
    assert environment.calls == []
