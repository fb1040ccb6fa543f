"""Exports detectors as files for other runtimes, and verifies each file against its model.

`saccade export` runs `saccade.export.detectors.export_detector`. docs/export.md lists what works in
which runtime.
"""
