"""torch.export and torch.jit.trace of the operator and modules, with dynamic sizes."""

from __future__ import annotations

import pytest
import torch
from export_helpers import CASES

from saccade.integrations.tracing import symbolic_sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_exported_saved_and_loaded(name, tmp_path):
    target = CASES[name]
    module, inputs = target.make().eval(), target.inputs
    with torch.no_grad():
        program = torch.export.export(module, inputs(2, 5, 8, 12), dynamic_shapes=target.dynamic)
        assert "saccade" in program.graph_module.code
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        for size in ((2, 5, 8, 12), (3, 7, 8, 12), (1, 5, 14, 10)):
            call = inputs(*size)
            torch.testing.assert_close(loaded(*call), module(*call))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_trace_is_for_one_resolution(name):
    """torch.jit.trace records the sizes of the maps as constants; another resolution is an error."""
    module, inputs = CASES[name].make().eval(), CASES[name].inputs
    with torch.no_grad():
        traced = torch.jit.trace(module, inputs(2, 5, 8, 12), check_trace=False)
        for size in ((2, 5, 8, 12), (3, 7, 8, 12), (1, 5, 8, 12)):
            call = inputs(*size)
            torch.testing.assert_close(traced(*call), module(*call))
        with pytest.raises(RuntimeError):
            traced(*inputs(2, 5, 14, 10))


def test_without_symbolic_sizes_a_model_fixes_its_resolution():
    class Lines(torch.nn.Module):
        def forward(self, feature_map):
            height, width = feature_map.shape[2:]
            rows = torch.linspace(0.5, height - 0.5, height)
            columns = torch.linspace(0, width - 1, width)
            return rows, columns, torch.as_tensor([(height, width)], dtype=torch.long)

    dynamic = {axis: torch.export.Dim.DYNAMIC for axis in (2, 3)}
    small, large = torch.zeros(1, 1, 8, 6), torch.zeros(1, 1, 16, 12)
    with symbolic_sizes():
        program = torch.export.export(Lines(), (small,), dynamic_shapes=(dynamic,))
    torch.testing.assert_close(program.module()(large), Lines()(large), rtol=0, atol=0)
    with pytest.raises(torch._dynamo.exc.UserError):
        torch.export.export(Lines(), (small,), dynamic_shapes=(dynamic,))


def test_symbolic_sizes_leaves_alone_what_it_would_change():
    class Lines(torch.nn.Module):
        def forward(self, feature_map):
            height = feature_map.shape[2]
            values = torch.tensor([height, 0.5])
            return torch.linspace(0.5, height - 0.5, steps=height, dtype=torch.float64), values

    class Whole(torch.nn.Module):
        def forward(self, feature_map):
            height = feature_map.shape[2]
            return torch.linspace(0.5, height - 0.5, height, dtype=torch.int64)

    small = torch.zeros(1, 1, 8, 6)
    with symbolic_sizes():
        program = torch.export.export(
            Lines(), (small,), dynamic_shapes=({2: torch.export.Dim.AUTO},)
        )
        whole = torch.export.export(Whole(), (small,), dynamic_shapes=({2: torch.export.Dim.AUTO},))
    torch.testing.assert_close(program.module()(small), Lines()(small), rtol=0, atol=0)
    torch.testing.assert_close(whole.module()(small), Whole()(small), rtol=0, atol=0)
