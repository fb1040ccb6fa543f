"""What a fork carries as `models/ops`, without the CUDA sources."""

from ops.modules import MSDeformAttn as MSDeformAttn
