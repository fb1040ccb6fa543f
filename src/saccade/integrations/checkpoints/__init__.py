"""Checkpoints of other packages: their attention weights in `saccade.nn` modules.

The attention modules of a state dict are found by what they own, `sampling_offsets` and
`attention_weights`, whatever package they come from and whatever they are called there: Deformable DETR
and its forks, Mask2Former, Grounding DINO, detrex, mmdet, RT-DETR, RF-DETR, transformers.
"""

from saccade.integrations.checkpoints.entries import Checkpoint as Checkpoint
from saccade.integrations.checkpoints.entries import attention_prefixes as attention_prefixes
from saccade.integrations.checkpoints.entries import state_dict_of as state_dict_of
from saccade.integrations.checkpoints.files import load as load
from saccade.integrations.checkpoints.modules import AttentionModules as AttentionModules
from saccade.integrations.checkpoints.modules import attention_modules as attention_modules
