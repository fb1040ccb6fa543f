"""Drop-in replacement of other packages' deformable attention; one file a package."""

from saccade.integrations.transformers import patch as patch
from saccade.integrations.transformers import unpatch as unpatch
