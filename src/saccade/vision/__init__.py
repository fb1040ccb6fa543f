"""What the command line shows and draws: detection, and where queries looked."""

MAX_MEGAPIXELS = 100
"""The default limit of an image's width times height, in millions of pixels."""
