"""`patch` of a package by name: every file of it, imported before or not."""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_patching import counted_calls

import saccade
from saccade.integrations.patching import PatchReport

FILES = {
    "__init__.py": "",
    "broken.py": """
        import an_extension_that_nobody_compiled
        def core(value, spatial_shapes, sampling_locations, attention_weights): ...
    """,
    "script.py": """
        raise SystemExit("sampling_locations: run by import")
    """,
    "benchmark.py": """
        def core(value, spatial_shapes, sampling_locations, attention_weights): ...
        raise SystemExit(3)
    """,
    "functions.py": """
        from test_patching import Core as _Core, sampled

        class Core(_Core):
            pass

        def core(value, spatial_shapes, sampling_locations, attention_weights):
            return sampled(value, spatial_shapes, sampling_locations, attention_weights)

        def other(value, spatial_shapes, sampling_locations, attention_weights):
            return -core(value, spatial_shapes, sampling_locations, attention_weights)
    """,
    "layers.py": """
        import torch
        from test_patching import Attention, SHAPES
        from .functions import Core, core as renamed

        class Layer(torch.nn.Module):
            def forward(self, value, spatial_shapes, sampling_locations, attention_weights):
                return renamed(value, spatial_shapes, sampling_locations, attention_weights)

        class Module(Attention):
            def __init__(self):
                super().__init__()
                self.layer = Layer()

            def forward(self, value):
                inside = self.layer(self.rows(value), SHAPES, self.locations, self.weights)
                return inside + renamed(self.rows(value), SHAPES, self.locations, self.weights)
    """,
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "forked_detr"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "forked_detr"
    for name in [name for name in sys.modules if name.startswith("forked_detr")]:
        del sys.modules[name]


@pytest.mark.slow
def test_a_package_by_name(package, monkeypatch):
    calls = counted_calls(monkeypatch)
    report = saccade.patch(package)
    functions, layers = (sys.modules[f"{package}.{name}"] for name in ("functions", "layers"))
    assert report.replaced == [
        f"{package}.functions.Core",
        f"{package}.functions.core",
        f"{package}.layers.Core",
        f"{package}.layers.Layer.forward",
        f"{package}.layers.renamed",
    ]
    assert report.left.keys() == {
        *(f"{package}.{name}" for name in ("benchmark", "broken", "functions.other"))
    }
    assert report.left[f"{package}.benchmark"] == "it cannot be imported: SystemExit: 3"
    assert "an_extension_that_nobody_compiled" in report.left[f"{package}.broken"]
    assert saccade.patch(sys.modules[package]) == report
    model, value = layers.Module(), torch.randn(2, 120, 16)
    calls.clear()
    output = model(value)
    assert len(calls) == 2
    assert saccade.patch(model).replaced == ["", "layer"]
    assert saccade.unpatch(model).replaced == ["", "layer"]
    assert saccade.unpatch(model).left == {
        "": "its package is patched, not this model",
        "layer": "its package is patched, not this model",
    }
    assert saccade.unpatch(package).replaced == report.replaced
    assert functions.core.__name__ == "core"
    assert isinstance(functions.core, type(test_a_package_by_name))
    assert "forward" not in vars(model)
    torch.testing.assert_close(model(value), output)
    assert len(calls) == 2


@pytest.mark.slow
def test_a_package_goes_back_to_the_same_objects(package):
    names = ("functions", "layers")
    files = [importlib.import_module(f"{package}.{name}") for name in names]
    before = [dict(vars(file)) for file in files]
    forward = files[1].Layer.forward
    saccade.patch(package)
    assert files[1].Layer.forward is not forward
    saccade.unpatch(package)
    assert files[1].Layer.forward is forward
    for file, wanted in zip(files, before, strict=True):
        assert vars(file).keys() == wanted.keys()
        assert all(vars(file)[name] is wanted[name] for name in wanted)
    assert saccade.unpatch(package) == PatchReport([], {})


@pytest.mark.slow
def test_models_made_while_a_package_is_patched(package):
    functions = importlib.import_module(f"{package}.functions")
    saccade.patch(package)
    kept = torch.nn.Module()
    kept.look, kept.again = functions.core, functools.partial(functions.core, num=1)
    loaded = pickle.loads(pickle.dumps(kept))
    assert saccade.patch(kept).replaced == [""]
    saccade.unpatch(package)
    assert loaded.look is functions.core
    assert saccade.unpatch(kept).replaced == [""]
    assert kept.look is functions.core
    assert kept.again.func is functions.core
    assert kept.again.keywords == {"num": 1}


@pytest.mark.slow
def test_odd_things_in_other_packages_do_no_harm(package, tmp_path, monkeypatch):
    def loop():
        pass

    loop.__wrapped__ = loop
    odd = ModuleType("odd_things")
    odd.loop = loop
    monkeypatch.setitem(sys.modules, "odd_things", odd)
    (tmp_path / "forked_detr" / "folder.py").mkdir()
    assert saccade.patch(package).replaced
    saccade.unpatch(package)


def test_a_package_that_lacks_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "needs_much.py").write_text("import something_large")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="target: needs_much cannot be imported: No module named"):
        saccade.patch("needs_much")
