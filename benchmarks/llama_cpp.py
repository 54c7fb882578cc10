"""llama.cpp's own way: its converter, from the source distribution of llama-cpp-python, and its quantizer.

`python -m benchmarks.llama_cpp SOURCE.gguf OUT.gguf LEVEL THREADS` runs the quantizer alone.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.measure import Cost, run
from spec.errors import MissingDependency, UserError

CONVERTER_NEEDS = ("torch", "transformers", "sentencepiece", "numpy")
KEPT = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")


def version() -> str:
    """The installed llama-cpp-python. Raises `MissingDependency`."""
    absent = [m for m in ("llama_cpp", *CONVERTER_NEEDS) if importlib.util.find_spec(m) is None]
    if absent:
        raise MissingDependency(f"llama.cpp's tools need {', '.join(absent)}: pip install 'allotrope[train,gguf,hf]'")
    return importlib.metadata.version("llama_cpp_python")


def converter() -> Path:
    """The folder with convert_hf_to_gguf.py in the installed version, fetched once with pip into the user's cache.

    Raises `UserError` where pip can't get it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "allotrope" / "benchmarks"
    target = cache / f"llama.cpp-{version()}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        name = f"llama-cpp-python=={version()}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python",
                   "--dest", temporary, name]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not found:
            said = done.stderr.strip().splitlines() or ["nothing was downloaded"]
            raise UserError(f"{name}: pip could not fetch its source: {said[-1]}")
        unpacked = Path(temporary) / "llama.cpp"
        _unpack(found[0], unpacked)
        unpacked.rename(target)
    return target


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and inside.startswith(KEPT):
                member.name = inside
                tar.extract(member, target, filter="data")


def convert(source: Path, out: Path, level: str, threads: int) -> dict[str, Cost]:
    """A Hugging Face folder to a GGUF at a level: float16 first, then quantized. The cost of both steps."""
    middle = out.with_name(out.stem + ".f16.gguf")
    try:
        script = converter() / "convert_hf_to_gguf.py"
        first = run([sys.executable, script, source, "--outfile", middle, "--outtype", "f16"])
        second = run([sys.executable, "-m", "benchmarks.llama_cpp", middle, out, level, str(threads)])
    finally:
        middle.unlink(missing_ok=True)
    return {"convert": first, "quantize": second}


def quantize(source: Path, out: Path, level: str, threads: int) -> None:
    """llama.cpp's quantizer on a GGUF. Raises `UserError` for a level that it does not have, or where it fails."""
    import llama_cpp

    ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{level.upper()}", None)
    if ftype is None:
        raise UserError(f"{level}: no level of llama.cpp's quantizer")
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype = threads, ftype
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.pointer(options))
    if status:
        raise UserError(f"{source}: llama_model_quantize ended with {status}")


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
