"""Checkpoints in, artifacts out: read -> quantize -> write as one stream, verified before the result gets its name."""
