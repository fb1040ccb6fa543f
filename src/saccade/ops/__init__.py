"""The registered operators `torch.ops.saccade.*`: importing this package defines them."""

from saccade.ops import registration as registration
