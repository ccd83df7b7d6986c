"""CITATION.cff and pyproject.toml say the same, and name nothing that is not there."""

from typing import Any

import pytest
import yaml
from support.paths import ROOT

import fastcnn


@pytest.fixture
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_citation_is_the_project_s(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == project["version"] == fastcnn.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation["title"].startswith(f"{project['name']}:")


def test_files_that_the_project_names_exist(project: dict[str, Any]) -> None:
    for name in (project["readme"], *project["license-files"]):
        assert (ROOT / name).is_file()
    # PEP 639: the license is `license`'s alone.
    assert not [name for name in project["classifiers"] if name.startswith("License")]
    assert project["classifiers"] == sorted(project["classifiers"])
    assert project["keywords"] == sorted(project["keywords"])
