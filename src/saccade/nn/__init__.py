"""The modules: deformable attention and convolution with their projections, ready to put into a network."""

from saccade.nn.convolution import DeformableConv as DeformableConv
from saccade.nn.multi_scale import MultiScaleDeformableAttention as MultiScaleDeformableAttention
from saccade.nn.multi_view import MultiViewDeformableAttention as MultiViewDeformableAttention
from saccade.nn.single_map import DeformableAttention as DeformableAttention
