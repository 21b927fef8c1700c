"""The scripts of the gallery run as they are."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "docs" / "gallery").glob("plot_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script(script):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(script))


def test_there_are_scripts():
    assert len(SCRIPTS) >= 4
