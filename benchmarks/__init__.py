"""Measurements whose results are committed here."""
