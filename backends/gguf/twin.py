"""placeholder"""
from pathlib import Path


def twin(artifact: Path, out: Path) -> Path:
    return out
