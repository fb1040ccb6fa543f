"""What the command line shows and draws: detection, and where queries looked."""
