"""The command line: exit codes, messages, 80 columns, and what works without the extras."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saccade
from saccade import doctor
from saccade.ops import native

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")


def run(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in a process of its own."""
    source = str(Path(saccade.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "COLUMNS": "80",
            "PYTHONIOENCODING": "utf-8",
            **environment,
        },
    )


def invoke(*arguments: object):
    from saccade.cli import app

    runner = typer_testing.CliRunner(env={"COLUMNS": "80"})
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def hide(monkeypatch):
    """Makes modules impossible to import, as if they were not installed."""

    def hide_modules(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide_modules


def test_version_and_help() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"saccade {saccade.__version__}\n")
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("detect", "explain", "doctor"):
        assert command in result.output
    assert "Exit code: 0 all done" in " ".join(invoke("detect", "--help").output.split())


@pytest.mark.slow
def test_help_and_explain_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from saccade.__main__ import main\n"
        "for command in ('--help', 'explain'):\n"
        "    try: main([command])\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = {'transformers', 'matplotlib', 'PIL', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = run(program)
    assert done.returncode == 0, done.stderr


# --- explain ----------------------------------------------------------------------------------


def test_explain_walks_through_the_worked_example_in_80_columns() -> None:
    result = invoke("explain")
    assert result.exit_code == 0, result.output
    assert "saccade.deformable_attention gives 16.5" in result.stdout
    assert "(+0.5, -0.5)" in result.stdout
    assert "…" not in result.stdout  # no column was cut
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_explain_moves_the_reference_point_and_draws(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    result = invoke("explain", "--reference", "1.3", "-0.6", "--out", tmp_path / "explain.png")
    assert result.exit_code == 0, result.output
    assert "outside" in result.output
    from PIL import Image

    assert Image.open(tmp_path / "explain.png").width > 1000
    result = invoke("explain", "--out", tmp_path / "no" / "folder.png")
    assert result.exit_code == 2
    assert "cannot write" in result.output


def test_explain_shows_a_module_in_80_columns(tmp_path) -> None:
    module = saccade.nn.MultiScaleDeformableAttention(32, num_heads=4, num_levels=4)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=3.0)
    torch.save(module, tmp_path / "module.pt")
    shapes = [(40, 60), (20, 30), (10, 15), (5, 8)]
    inputs = {
        "query": torch.randn(1, 9, 32),
        "reference_points": torch.rand(1, 9, 1, 4),
        "value": torch.randn(1, sum(h * w for h, w in shapes), 32),
        "spatial_shapes": shapes,
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    files = (tmp_path / "module.pt", tmp_path / "inputs.pt")
    result = invoke("explain", *files, "--query", 8, "--head", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("equal (difference") == 2
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    result = invoke("explain", tmp_path / "module.pt", tmp_path / "inputs.pt", "--query", 9)
    assert result.exit_code == 2
    assert "query: expected 0 to 8, got 9" in result.output
    result = invoke("explain", tmp_path / "module.pt")
    assert result.exit_code == 2
    assert "takes both MODULE and INPUTS" in result.output


# --- doctor -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_needs_torch_only() -> None:
    program = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'transformers', 'PIL', 'numpy', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "from saccade.__main__ import main\n"
        "sys.exit(main(['doctor']) or main(['--version']) or main([]))\n"
    )
    done = run(program, SACCADE_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch                {torch.__version__}" in done.stdout
    assert "pip install 'saccade[cli]'" in done.stdout
    assert "SACCADE_DISABLE_NATIVE is set" in done.stdout
    assert "backend              reference" in done.stdout
    assert "All checks passed." in done.stdout
    assert f"\nsaccade {saccade.__version__}\n" in done.stdout
    assert "usage: saccade" in done.stdout


@pytest.mark.parametrize("command", ["detect", "explain"])
def test_commands_without_their_extras_say_what_to_install(command, hide, capsys) -> None:
    from saccade.__main__ import main

    hide("typer")
    assert main([command, "x.png"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "pip install 'saccade[detect]'" in printed.err


def test_detect_and_images_without_their_extras_say_what_to_install(hide) -> None:
    hide("transformers", "PIL", "matplotlib")
    result = invoke("detect", "x.png")
    assert result.exit_code == 2
    assert "needs matplotlib, transformers, PIL" in result.stderr
    assert "pip install 'saccade[detect]'" in result.stderr
    result = invoke("explain", "--out", "x.png")
    assert result.exit_code == 2
    assert "pip install 'saccade[explain]'" in result.stderr


@pytest.mark.slow
def test_doctor_finds_this_installation_healthy() -> None:
    lines: list[str] = []
    assert doctor.run(lines.append) == 0, "\n".join(lines)
    for kernel in native.available_isas():
        assert any(line.startswith(f"  cpu-{kernel} ") for line in lines)


def test_doctor_fails_for_a_library_that_does_not_load(tmp_path, monkeypatch) -> None:
    broken = tmp_path / "_native.so"
    broken.write_text("no library")
    monkeypatch.delenv("SACCADE_DISABLE_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", broken)
    monkeypatch.setattr(native, "failure", "_native.so did not load: invalid ELF header")
    lines: list[str] = []
    assert doctor.run(lines.append) == 1
    assert any(line.startswith("! state") and "invalid ELF" in line for line in lines)
    assert "FAILED" in lines[-1]


def test_doctor_fails_for_wrong_numbers() -> None:
    good = {"output": 1e-7, "the gradient of value": 2e-6}
    assert doctor.summarize_errors("cpu-avx2", good).ok
    assert "2.0e-06, in the gradient of value" in doctor.summarize_errors("cpu-avx2", good).text
    assert not doctor.summarize_errors("cpu-avx2", {**good, "output": 0.01}).ok
    worst = doctor.summarize_errors(
        "cpu-avx2", {"output": float("nan"), "the gradient of value": 0.5}
    )
    assert not worst.ok
    assert "NaN or infinity, in output" in worst.text


@pytest.mark.slow
def test_doctor_compares_forward_and_gradients(monkeypatch) -> None:
    errors = doctor.compare_with_reference()
    assert set(errors) == {
        "output",
        "the gradient of value",
        "the gradient of sampling_locations",
        "the gradient of attention_weights",
        "the gradient of reference_points",
        "the gradient of sampling_offsets",
        "the gradient of attention_logits",
    }
    assert max(errors.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    ("offsets", "points"), [(False, "sampling_locations"), (True, "sampling_offsets")]
)
def test_doctor_notices_a_wrong_operator(monkeypatch, offsets, points, softmax) -> None:
    """The operator is wrong for one of the four kinds of calls only."""
    right = doctor.functional.run

    def wrong(call):
        is_wrong = (call.reference_points is not None, call.options.softmax) == (offsets, softmax)
        return right(call) * (1.01 if is_wrong else 1.0)

    monkeypatch.setattr(doctor.functional, "run", wrong)
    errors = doctor.compare_with_reference(num_queries=4)
    for result in ("output", "the gradient of value", f"the gradient of {points}"):
        assert errors[result] > 5e-3


# --- detect -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    from vision_helpers import save_random_detector

    return save_random_detector(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def images(tmp_path) -> list[Path]:
    from vision_helpers import gradient_image

    paths = [tmp_path / "one" / "scene.png", tmp_path / "two" / "scene.jpg"]
    for path in paths:
        path.parent.mkdir()
        gradient_image(80, 60).save(path)
    return paths


@pytest.mark.slow
def test_detect_writes_three_files_per_image(model, images, tmp_path) -> None:
    out = tmp_path / "out"
    result = invoke("detect", *images, "--model", model, "--out", out, "--threshold", 0.99)
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in out.iterdir()) == [
        "scene-2.json",
        "scene-2_detections.png",
        "scene-2_looked.png",
        "scene.json",
        "scene_detections.png",
        "scene_looked.png",
    ]
    assert str(images[0]) in result.output


@pytest.mark.slow
def test_detect_skips_what_it_cannot_read(model, images, tmp_path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    out = tmp_path / "out"
    result = invoke("detect", broken, images[0], "gone.png", "--model", model, "--out", out)
    assert result.exit_code == 1
    assert f"skipped: {broken} is not an image" in result.stderr
    assert "skipped: gone.png does not exist" in result.stderr
    assert "2 of 3 images skipped" in result.stderr
    assert (out / "scene.json").exists()
    result = invoke("detect", broken, "--model", model, "--out", out)
    assert result.exit_code == 2


@pytest.mark.slow
def test_detect_is_quiet_in_a_process_of_its_own_and_repeatable(model, images, tmp_path) -> None:
    options = (images[0], "--model", model, "--threshold", 0.9, "--out")
    program = "import sys; from saccade.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = run(program, "detect", *options, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no log messages or progress bars of other libraries
    with saccade.use_backend("reference"):
        assert invoke("detect", *options, tmp_path / "b").exit_code == 0
    first, second = (json.loads((tmp_path / name / "scene.json").read_text()) for name in "ab")
    assert second["backend"] == "reference"
    assert len(first["detections"]) == len(second["detections"])
    for one, other in zip(first["detections"], second["detections"], strict=True):
        assert one["query"] == other["query"]
        assert one["box"] == pytest.approx(other["box"], abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "neither a folder nor the id"),
        (["--layer", "7"], "--layer: expected 1 to 2"),
        (["--threshold", "2"], "threshold"),
    ],
)
def test_detect_with_wrong_usage_ends_with_2(model, images, tmp_path, arguments, message) -> None:
    model_option = ["--model", model] if "--model" not in arguments else []
    result = invoke("detect", images[0], *model_option, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert invoke("detect").exit_code == 2


@pytest.mark.parametrize(
    "command", [("detect", "x.png"), ("export",), ("bench",), ("bench", "models")]
)
def test_more_threads_than_the_processors_can_run_are_refused(command, monkeypatch) -> None:
    """Hundreds of thousands of threads end the process after a minute."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail(f"{count} threads"))
    limit = 4 * os.cpu_count()
    for threads, bound in {0: 1, -1: 1, limit + 1: limit, 999_999: limit}.items():
        result = invoke(*command, "--threads", threads)
        assert result.exit_code == 2, result.output
        assert re.search(rf"--threads.*\b{bound}\b", " ".join(result.stderr.split()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_output_that_cannot_be_written_is_an_error() -> None:
    source = Path(saccade.__file__).resolve().parent.parent
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "saccade", "explain"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
            env={**os.environ, "PYTHONPATH": str(source)},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_detect_into_a_folder_that_is_a_file_ends_with_2(model, images, tmp_path) -> None:
    (tmp_path / "out").write_text("")
    result = invoke("detect", images[0], "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot make the folder" in result.output
