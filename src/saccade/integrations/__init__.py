"""Drop-in replacement of other packages' deformable attention."""

from saccade.integrations.patching import PatchReport as PatchReport
from saccade.integrations.patching import patch as patch
from saccade.integrations.patching import unpatch as unpatch
