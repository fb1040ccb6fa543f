"""Saccade in other packages: their operators, compiled modules, checkpoints and exports."""

from saccade.integrations.patching import PatchReport as PatchReport
from saccade.integrations.patching import patch as patch
from saccade.integrations.patching import unpatch as unpatch
