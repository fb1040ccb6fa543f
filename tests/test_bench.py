"""`saccade bench`, and one smallest run of each command in benchmarks/."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from saccade import doctor
from saccade.bench import models, operator
from saccade.bench.command import app
from saccade.bench.operator import BASELINES, WORKLOADS, Workload, compare, describe_error
from saccade.ops import native
from saccade.timing import alternate

TINY = Workload("tiny", "", [(4, 5), (2, 3)], 7, num_heads=2, head_dim=8, num_points=2)
NEEDS_NATIVE = pytest.mark.skipif(
    native.failure is not None, reason=f"no native library: {native.failure}"
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Every workload is tiny, but for its name; torch has its number of threads again afterwards."""
    for name, workload in WORKLOADS.items():
        shapes = [tuple(min(size, 3) for size in shape) for shape in workload.shapes]
        small = workload._replace(shapes=shapes, num_heads=2, head_dim=8, batch_size=1)
        monkeypatch.setitem(WORKLOADS, name, small._replace(num_queries=workload.num_queries and 5))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})
    return result.exit_code, result.output


def run_command(module, *words):
    """`python -m MODULE WORDS` in this process: its exit code and what it printed."""
    pytest.importorskip("transformers")
    main = importlib.import_module(module).main
    printed, before = io.StringIO(), sys.argv
    sys.argv = [module, *map(str, words)]
    try:
        with contextlib.redirect_stdout(printed):
            code = main()
    finally:
        sys.argv = before
    return code, printed.getvalue()


# --- saccade bench ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_measures_prints_and_writes(tmp_path):
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    code, output = bench(
        *("--case", "detr-decoder", "--case", "medical-3d", "--backward", "--seconds", 0),
        *("--threads", 1, "--json", path, "--plot", plot),
    )
    assert code == 0, output
    assert "detr-decoder · forward + backward · float32 · threads: 1" in output
    results = json.loads(path.read_text())
    measured = {(row["workload"], row["baseline"]) for row in results["measurements"]}
    assert {("detr-decoder", "saccade"), ("medical-3d", "saccade")} <= measured
    assert results["machine"]["torch"] == torch.__version__
    assert plot.stat().st_size > 1000


def test_bench_without_its_extras(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: name != "transformers")
    code, output = bench("models")
    assert code == 2
    assert "saccade bench models needs transformers" in output
    assert "pip install 'saccade[bench]'" in output


def test_a_baseline_that_is_skipped_is_named_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_ms_deform_attn", None)
    code, output = bench("--case", "medical-3d", "--seconds", 0)
    assert code == 0, output
    if doctor.installed("transformers"):
        assert "grid_sample: transformers has it for images only" in output
    assert "torch-ms-deform-attn: ModuleNotFoundError" in output
    assert "pip install --no-build-isolation --no-deps torch-ms-deform-attn" in output


def test_wrong_results_are_an_error(monkeypatch):
    def prepare(workload):
        return lambda value, locations, weights: weights.new_ones(1, workload.queries, 16)

    wrong = BASELINES["grid_sample"]._replace(prepare=prepare)
    monkeypatch.setitem(BASELINES, "grid_sample", wrong)
    code, output = bench("--case", "detr-decoder", "--seconds", 0)
    assert code == 1
    assert "wrong output: grid_sample is off by" in output


def test_errors_are_described_by_their_first_line():
    assert (
        describe_error(RuntimeError("no such kernel\nand more")) == "RuntimeError: no such kernel"
    )
    assert describe_error(NotImplementedError("takes images")) == "takes images"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "detr"], "--case: expected one of detr-encoder"),
        (["--dtype", "int8"], "--dtype: expected one of float32, bfloat16, float16, got int8"),
    ],
)
def test_names_that_are_not_known(words, message):
    code, output = bench(*words)
    assert code == 2
    assert message in output


def test_list_names_the_workloads():
    code, output = bench("--list")
    assert code == 0
    assert all(name in output for name in WORKLOADS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_values_beside_a_baseline_that_computes_in_float32(dtype):
    pytest.importorskip("transformers")
    baselines = [BASELINES["saccade"], BASELINES["grid_sample"]]
    rows = compare(TINY, baselines, dtype=dtype, backward=True, seconds=0)
    assert [row["computes_in"] for row in rows] == [str(dtype)[6:], "float32"]
    assert all(row["ratio"] > 0 for row in rows)


# --- turns -----------------------------------------------------------------------------------------


def test_turns_are_taken_by_all_in_their_contexts():
    ran = []

    @contextlib.contextmanager
    def context():
        ran.append("enter")
        yield
        ran.append("exit")

    functions = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    timings = alternate(functions, 0, 3, turn_seconds=0, contexts={"b": context})
    assert [timing.rounds for timing in timings.values()] == [3, 3]
    assert all(0 < timing.minimum <= timing.milliseconds for timing in timings.values())
    assert all(
        ran[index - 1] == "enter"
        for index, name in enumerate(ran)
        if name == "b" and index and ran[index - 1] != "b"
    )


def test_slow_functions_take_fewer_rounds(monkeypatch):
    monkeypatch.setattr("saccade.timing.SLOW_SECONDS", 0.0)
    assert alternate({"slow": lambda: None}, 0)["slow"].rounds == 3


# --- saccade bench models --------------------------------------------------------------------------


@pytest.fixture
def small_models(monkeypatch):
    pytest.importorskip("transformers")
    from benchmarks.small_models import SMALL_MODELS

    for name in models.MODELS:
        monkeypatch.setitem(models.MODELS, name, SMALL_MODELS[name])


@pytest.mark.slow
def test_models(small_models, tmp_path):
    path = tmp_path / "models.json"
    code, output = bench("models", "--model", "rt-detr-v2", "--seconds", 0, "--json", path)
    assert code == 0, output
    (row,) = json.loads(path.read_text())["models"]
    assert row["attention_modules"] == 2
    assert row["ratio"] > 0
    assert "RT-DETRv2" in output


def test_a_model_that_cannot_be_made_is_named_with_the_reason(small_models, monkeypatch):
    broken = models.MODELS["d-fine"]._replace(config={"decoder_layers": -1, "d_model": "no"})
    monkeypatch.setitem(models.MODELS, "d-fine", broken)
    code, output = bench("models", "--model", "d-fine", "--seconds", 0)
    assert code == 0, output
    assert "Error:" in output


def test_a_patched_model_with_other_outputs_is_an_error(small_models, monkeypatch):
    one = [torch.zeros(4), torch.tensor([1.0, -torch.inf])]
    other = [torch.zeros(4), torch.tensor([1.5, -torch.inf])]
    assert models.compare_outputs(one, one) == (0, 0)
    assert models.compare_outputs(other, one) == (0.5, 0.5)
    infinite = [torch.full((4,), torch.inf)]
    assert models.compare_outputs(infinite, infinite) == (0, 0)
    assert models.compare_outputs([torch.full((4,), torch.nan)], [torch.ones(4)]) == (1, torch.inf)
    monkeypatch.setattr(models, "compare_outputs", lambda *_: (0.5, 0.5))
    code, output = bench("models", "--model", "d-fine", "--seconds", 0)
    assert code == 1
    assert "wrong results: 50% of an output differ" in output


# --- the studies -----------------------------------------------------------------------------------


def test_the_tables_of_the_pages_are_those_of_the_results():
    code, printed = run_command("benchmarks.tables", "--check")
    assert code == 0, printed


@NEEDS_NATIVE
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "rfdetr-nano",
        *(pytest.param(one, marks=pytest.mark.nightly) for one in ("tadtr-1d", "medical-3d")),
    ],
)
def test_benchmarks_cpu(tmp_path, case):
    pytest.importorskip("onnxscript")
    path = tmp_path / "cpu.json"
    run_command("benchmarks.cpu", "--case", case, "--seconds", 0, "--output", path)
    results = json.loads(path.read_text())
    assert {"grid_sample", "saccade"} <= {row["baseline"] for row in results["measurements"]}


@pytest.mark.slow
def test_benchmarks_models(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    study = importlib.import_module("benchmarks.models")
    from benchmarks.small_models import SMALL_MODELS

    path = tmp_path / "models.json"
    monkeypatch.setattr(sys, "argv", ["models", "--seconds", "0", "--output", str(path)])
    study.write_models("models", None, [("lw-detr", SMALL_MODELS["lw-detr"])])
    (row,) = json.loads(path.read_text())["models"]
    assert row["ratio"] > 0


@pytest.mark.slow
@NEEDS_NATIVE
@pytest.mark.parametrize("case", ["detr-decoder", "bevformer-sca"])
def test_benchmarks_fused(tmp_path, monkeypatch, case):
    monkeypatch.setattr(importlib.import_module("benchmarks.fused"), "CELLS", 8)
    path = tmp_path / "fused.json"
    run_command("benchmarks.fused", "--case", case, "--seconds", 0, "--output", path)
    assert json.loads(path.read_text())["measurements"]


@NEEDS_NATIVE
def test_benchmarks_sweep(tmp_path):
    path, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    words = ("--case", "tadtr-1d", "--shapes", 0, "--seconds", 0, "--output", path, "--plot", plot)
    _, printed = run_command("benchmarks.sweep", *words)
    assert '"worst_ratio": 1.0' in printed
    assert json.loads(path.read_text())["shapes"]


@NEEDS_NATIVE
@pytest.mark.slow
def test_benchmarks_onnx(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_extensions")
    monkeypatch.setitem(importlib.import_module("benchmarks.onnx").SIZES, "512 x 512", (32, 32))
    path = tmp_path / "onnx.json"
    words = ("--case", "operator", "--size", "512 x 512", "--seconds", 0, "--output", path)
    run_command("benchmarks.onnx", *words)
    assert "operator" in json.loads(path.read_text())["images"]["512 x 512"]


@NEEDS_NATIVE
@pytest.mark.nightly
def test_benchmarks_compile(tmp_path):
    path = tmp_path / "compile.json"
    case = "DeformableAttention, 300 queries"
    run_command("benchmarks.compile", "--case", case, "--seconds", 0, "--output", path)
    assert case in json.loads(path.read_text())["cases"]


@NEEDS_NATIVE
def test_benchmarks_whole(tmp_path):
    path = tmp_path / "whole.json"
    run_command("benchmarks.whole", "--only", "gradients_bitwise_equal", "--output", path)
    assert json.loads(path.read_text())["gradients_bitwise_equal"] is True


def test_benchmarks_gpu_says_that_it_needs_a_card(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command("benchmarks.gpu.__main__")[0] == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_truth_finds_a_wrong_gradient():
    inputs = operator.draw(TINY, dtype=torch.float32)
    truth = operator.Truth(TINY, inputs, backward=True)
    run = operator.timed_call(operator.saccade_function(TINY), inputs, backward=True)
    output, grad_value, grad_locations, grad_weights = run()
    truth.check("saccade", [output, grad_value, grad_locations, grad_weights])
    with pytest.raises(ArithmeticError, match="wrong grad_weights: other"):
        truth.check("other", [output, grad_value, grad_locations, 2 * grad_weights])
    with pytest.raises(ArithmeticError, match="wrong grad_value: other"):
        truth.check("other", [output, 2 * grad_value, grad_locations, grad_weights])
