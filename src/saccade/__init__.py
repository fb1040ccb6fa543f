"""Saccade: deformable attention, exact, fast on plain CPUs, nothing to compile, and visible."""

from saccade import nn as nn
from saccade import reference as reference
from saccade.backend import Backend as Backend
from saccade.backend import use_backend as use_backend
from saccade.backend import which_backend as which_backend
from saccade.compositions import (
    depth_weighted_deformable_attention as depth_weighted_deformable_attention,
)
from saccade.compositions import (
    multi_camera_deformable_aggregation as multi_camera_deformable_aggregation,
)
from saccade.convolution import deformable_convolution as deformable_convolution
from saccade.functional import deformable_attention as deformable_attention
from saccade.functional import fused_deformable_attention as fused_deformable_attention
from saccade.integrations import patch as patch
from saccade.integrations import unpatch as unpatch
from saccade.ops.flops import register_flop_formulas as register_flop_formulas
from saccade.sampling import Sampling as Sampling

__version__ = "0.1.0"
