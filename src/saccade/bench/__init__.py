"""`saccade bench`: how fast the operator and whole models are on this machine."""
