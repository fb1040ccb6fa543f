"""`python -m benchmarks.gpu`: Saccade on an NVIDIA GPU, checked, timed beside its peers, against floors."""
