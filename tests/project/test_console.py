"""The commands by every name they have, from processes of their own."""

import re
import subprocess
import sys

import pytest

import fastcnn
from fastcnn import cli


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    # A warning, as runpy's of a module that is imported already, is an error.
    command = [sys.executable, "-W", "error", "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fastcnn {fastcnn.__version__}\n"


def test_the_package_is_the_command() -> None:
    done = run("fastcnn", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"fastcnn {fastcnn.__version__}\n"


def test_info_by_its_module(capsys: pytest.CaptureFixture[str]) -> None:
    done = run("fastcnn.info")
    assert (done.returncode, done.stderr) == (0, "")
    cli.main(["info"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in done.stdout.splitlines()] == names
    assert done.stdout.startswith("fastcnn ")


def test_a_wrong_command_names_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train-it"])
    assert exit_.value.code == 2
    assert re.search(r"'train-it' \(choose from '?demo'?, '?info'?\)", capsys.readouterr().err)
