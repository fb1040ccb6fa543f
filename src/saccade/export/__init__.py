"""Detectors as files for other runtimes, each verified against the model it was made from.

`saccade.export.detectors.export_detector` is what `saccade export` runs. docs/export.md says what works
in which runtime.
"""
