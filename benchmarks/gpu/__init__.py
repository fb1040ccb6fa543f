"""Saccade on an NVIDIA GPU: times, machine code, tuning."""
