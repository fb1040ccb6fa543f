"""The GPU backend. Importing this package imports Triton."""

from saccade.backends.triton.backward import backward as backward
from saccade.backends.triton.backward import backward_plan as backward_plan
from saccade.backends.triton.forward import forward as forward
from saccade.backends.triton.forward import forward_plan as forward_plan
