"""The registered operator `torch.ops.saccade.deformable_attention` and its backward.

Importing this package registers them.
"""

from saccade.ops import registration as registration
