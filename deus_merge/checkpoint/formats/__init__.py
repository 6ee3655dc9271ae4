"""Formats of quantised weights: one file each."""
