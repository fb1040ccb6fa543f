"""The pages for users of other packages: their scripts run, and say what the pages show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import packages
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*command, folder=EXAMPLES):
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )


def run_with_packages(script, *names):
    code = f"""
import runpy, sys
sys.argv = [{str(script)!r}, "--rounds", "1"]
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    return packages.run(code, *names)


def shown(page):
    """The output that a page shows: its last block of text after the commands."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for block in blocks if "replaced:" in block or "$ " in block][-1]


def replaced(text):
    return [line for line in text.splitlines() if line.startswith("replaced:")]


@pytest.mark.slow
def test_a_fork_needs_nothing_but_the_runner():
    folder = EXAMPLES / "deformable_detr_fork"
    without = run("fork/main.py", folder=folder)
    assert "No module named 'MultiScaleDeformableAttention'" in without.stderr
    found = run(
        *("-m", "saccade.integrations.extensions", "MultiScaleDeformableAttention"),
        *("--", "fork/main.py"),
        folder=folder,
    )
    assert found.returncode == 0, found.stderr
    distances = [float(number) for number in re.findall(r": ([\d.]+) pixels", found.stdout)]
    assert len(distances) == 4
    assert distances[-1] < distances[0] / 4
    assert shown(folder / "README.md").count("pixels from the centre") == 4


@pytest.mark.slow
def test_transformers():
    folder = EXAMPLES / "transformers_models"
    found = run("compare.py", "--rounds", "1", folder=folder)
    assert found.returncode == 0, found.stderr
    page = shown(folder / "README.md")
    assert replaced(found.stdout) == replaced(page)
    objects = re.findall(r"^  \d .*", page, flags=re.MULTILINE)
    assert objects
    for line in objects:
        assert line.split(" at ")[1] in found.stdout
    assert "the same labels" in found.stdout


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("mmdetection/compare.py", ("torchvision", "mmcv", "mmdet", "mmengine")),
        ("rf_detr_on_a_cpu/detect.py", ("torchvision", "rfdetr")),
    ],
)
def test_packages(script, names):
    printed = run_with_packages(EXAMPLES / script, *names)
    assert replaced(printed) == replaced(shown((EXAMPLES / script).with_name("README.md")))
    (difference,) = re.findall(r"(?:scores to|differ by) ([\de.-]+)", printed)
    assert float(difference) < 1e-4
