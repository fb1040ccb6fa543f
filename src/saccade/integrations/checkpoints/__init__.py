"""Checkpoints of other packages: their attention weights in `saccade.nn` modules.

The attention modules of a state dict are recognised by their parameters `sampling_offsets` and
`attention_weights`, whatever their package and their name: Deformable DETR and its forks, Mask2Former,
Grounding DINO, detrex, mmdet, RT-DETR, RF-DETR, transformers.
"""

from saccade.integrations.checkpoints.files import load as load
from saccade.integrations.checkpoints.modules import AttentionModules as AttentionModules
from saccade.integrations.checkpoints.modules import attention_modules as attention_modules
from saccade.integrations.checkpoints.pickle_bounds import BoundError as BoundError
from saccade.integrations.checkpoints.pickle_bounds import Limits as Limits
from saccade.integrations.checkpoints.state_dict_parts import Checkpoint as Checkpoint
from saccade.integrations.checkpoints.state_dict_parts import (
    attention_prefixes as attention_prefixes,
)
from saccade.integrations.checkpoints.state_dict_parts import state_dict_of as state_dict_of
