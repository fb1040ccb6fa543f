"""Unmodified code of the projects that need compiled modules, on Saccade's.

Packages are those of `.ci/packages.txt`. Repositories are looked for in the folder that the environment
variable SACCADE_UPSTREAM names, each as OWNER+NAME.
"""

from __future__ import annotations

import os
from pathlib import Path

import packages
import pytest

UPSTREAM = os.environ.get("SACCADE_UPSTREAM")
OPERATORS = {
    "Deformable-DETR": "fundamentalvision+Deformable-DETR/models/ops",
    "DINO": "IDEA-Research+DINO/models/dino/ops",
    "Mask2Former": "facebookresearch+Mask2Former/mask2former/modeling/pixel_decoder/ops",
}
MMCV = ("torchvision", "mmcv", "mmengine")


def upstream(path):
    """A file or folder of a repository."""
    if not UPSTREAM:
        pytest.skip("SACCADE_UPSTREAM names no folder of repositories")
    found = Path(UPSTREAM) / path
    if not found.exists():
        pytest.skip(f"{path.partition('/')[0]} is not in the folder SACCADE_UPSTREAM")
    return str(found)


@pytest.mark.slow
@pytest.mark.parametrize("project", OPERATORS)
def test_the_checks_of_their_operators(project):
    operators = upstream(OPERATORS[project])
    printed = packages.run(f"import downstream; downstream.run_checks({operators!r})")
    assert printed.count("* True check_forward_equal_with_pytorch") == 2
    assert printed.count("* True check_gradient_numerical") == 7
    assert "False" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("part", ["classification", "detection"])
def test_the_checks_of_internimage(part):
    pytest.importorskip("saccade.integrations.dcn_extensions")
    operators = upstream(f"OpenGVLab+InternImage/{part}/ops_dcnv3")
    code = f"import downstream; downstream.run_dcnv3_checks({operators!r})"
    printed = packages.run(code, "pkg_resources")
    assert printed.count("* True check_forward") == 2
    assert "False" not in printed


@pytest.mark.parametrize("project", OPERATORS)
def test_their_modules_train(project):
    operators = upstream(OPERATORS[project])
    assert "losses" in packages.run(f"import downstream; downstream.train_module({operators!r})")


def test_the_encoder_of_deformable_detr_trains():
    repository = upstream("fundamentalvision+Deformable-DETR")
    assert "losses" in packages.run(f"import downstream; downstream.train_encoder({repository!r})")


@pytest.mark.parametrize(
    ("extension", "path", "downstream"),
    [
        (
            "groundingdino._C",
            "IDEA-Research+GroundingDINO/groundingdino/models/GroundingDINO/ms_deform_attn.py",
            "groundingdino.models.GroundingDINO.ms_deform_attn",
        ),
        (
            "detrex._C",
            "IDEA-Research+detrex/detrex/layers/multi_scale_deform_attn.py",
            "detrex.layers.multi_scale_deform_attn",
        ),
    ],
    ids=["Grounding DINO", "detrex"],
)
def test_modules_with_python_of_their_own_train(extension, path, downstream):
    file = upstream(path)
    code = f"import downstream; downstream.train_file({extension!r}, {file!r}, {downstream!r})"
    assert "losses" in packages.run(code)


@pytest.mark.slow
def test_the_tests_of_mmcv():
    repository = upstream("open-mmlab+mmcv")
    # Lifted before mmcv is imported: most of its tests ask whether there is a GPU.
    code = f"""
import sys
sys.path.insert(0, {repository!r})
import downstream, pytest
downstream.lift_cuda()
downstream.extensions.install("mmcv._ext")
import mmcv.utils
assert mmcv.__file__.startswith({repository!r})
mmcv.utils.IS_CUDA_AVAILABLE = True
file = {repository!r} + "/tests/test_ops/test_ms_deformable_attn.py"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", {repository!r}, file]))
"""
    printed = packages.run(code, *MMCV, timeout=600)
    assert "failed" not in printed
    print(printed)


@pytest.mark.slow
def test_mmcv_trains():
    assert "losses" in packages.run("import downstream; downstream.train_mmcv()", *MMCV)


@pytest.mark.slow
def test_the_function_of_mmcv():
    code = """
import torch
from saccade.integrations import extensions
extensions.install("mmcv._ext")
import mmcv.ops
import saccade
from mmcv.ops import multi_scale_deform_attn as module
shapes, starts = torch.tensor([[6, 8], [3, 4]]), torch.tensor([0, 48])
inputs = torch.randn(2, 60, 4, 8), torch.rand(2, 9, 4, 2, 3, 2), torch.rand(2, 9, 4, 2, 3)
attend = module.MultiScaleDeformableAttnFunction.apply
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)):
    # It makes the locations those of the value's dtype; the comparison starts from there.
    value, locations, weights = (each.to(dtype).requires_grad_() for each in inputs)
    found = attend(value, shapes, starts, locations, weights, 64)
    wide = [each.detach().float().requires_grad_() for each in (value, locations, weights)]
    expected = module.multi_scale_deformable_attn_pytorch(wide[0], shapes, *wide[1:])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(found.sum(), (value, locations, weights))
    for got, want in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance * 30)
# On a CPU its module calls a function of its own, which one line replaces.
attention = module.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True).eval()
query, points = torch.randn(2, 60, 32), torch.rand(2, 60, 2, 2)
arguments = {"reference_points": points, "spatial_shapes": shapes, "level_start_index": starts}
expected = attention(query, **arguments)
module.multi_scale_deformable_attn_pytorch = saccade.deformable_attention
torch.testing.assert_close(attention(query, **arguments), expected)
from mmcv.utils.ext_loader import check_ops_exist
from mmengine.utils.dl_utils import mmcv_full_available
assert check_ops_exist() and mmcv_full_available()
try:
    mmcv.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
except NotImplementedError as error:
    print(error)
"""
    assert "mmcv._ext.nms: Saccade provides" in packages.run(code, *MMCV)
