"""The small checkpoints of `convert.tests`."""

from convert.tests.conftest import checkpoint, small

__all__ = ["checkpoint", "small"]
