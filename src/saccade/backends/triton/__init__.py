"""The GPU kernels. Importing this package imports Triton."""

from saccade.backends.triton.backward import differentiate as differentiate
from saccade.backends.triton.backward import differentiate_fused as differentiate_fused
from saccade.backends.triton.launch import attend as attend
from saccade.backends.triton.launch import attend_fused as attend_fused
