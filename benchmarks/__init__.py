"""Allotrope against the tools that a user would pick instead, on the same machine and the same model."""
