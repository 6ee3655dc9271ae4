"""Hostile input, made by mutating valid files: no crash but our error types, and no blow-up of time or memory.

Every case is a function of its target and its number, so a finding is told by these two. ``python -m tests.fuzz`` runs
for as long as one likes and goes on where it stopped.
"""
