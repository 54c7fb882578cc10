"""TensorRT-RTX on a machine without a GPU: NVIDIA's real ONNX parser and ahead-of-time builder, in a child process.

`.ci/tensorrt-rtx` fetches two wheels into .venv/trt-rtx: TensorRT-RTX's libraries, which are linked to no driver, and
NVIDIA's TensorRT Python API. tensorrt_rtx.c joins them. Mixing the two is our own doing: it parses and builds, which is
what a graph's proof needs, and it cannot run an engine. The child forks once for each graph, since the mixed libraries
crash when they are taken down.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from backends.tensorrt import engine, graph
from spec.config import Spec
from spec.errors import UserError
from spec.load import dump, parse, read_yaml

HERE = Path(__file__).resolve().parent
HOME = HERE.parent / ".venv" / "trt-rtx"
NAMES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")


@dataclass(frozen=True)
class Built:
    """What came of one graph."""

    size: int = 0
    """Bytes of the engine; 0 where there is none."""
    error: str = ""
    seconds: float = 0.0


def libraries() -> tuple[Path, Path] | None:
    """The builder and the parser, where `.ci/tensorrt-rtx` has put them."""
    found = [
        sorted(HOME.glob(f"onnxruntime_ep*/{name}.so.*")) for name in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx")
    ]
    return (found[0][0], found[1][0]) if all(found) and (HOME / "tensorrt_bindings").is_dir() else None


def absent() -> str:
    """Why nothing can be built here; empty where it can."""
    if not sys.platform.startswith("linux"):
        return f"NOT_RUN: TensorRT-RTX has no builder for {sys.platform}"
    if libraries() is None:
        return "NOT_RUN: TensorRT-RTX is not installed (.ci/tensorrt-rtx fetches it)"
    if shutil.which("cc") is None:
        return "NOT_RUN: joining TensorRT-RTX to NVIDIA's Python API needs a C compiler (cc)"
    return ""


def _join(folder: Path) -> None:
    """Compile tensorrt_rtx.c under the names that the bindings ask for."""
    found = libraries()
    assert found is not None
    core, parser = found
    digits = re.search(r"\.so\.(\d+)\.(\d+)\.(\d+)$", core.name)
    assert digits is not None, core.name
    major, minor, patch = map(int, digits.groups())
    values = {"CORE": f'"{core}"', "PARSER": f'"{parser}"', "VERSION": str(major * 10000 + minor * 100 + patch)}
    defines = [f"-D{k}={v}" for k, v in values.items()]
    command = ["cc", "-shared", "-fPIC", *defines, "-o", str(folder / NAMES[0]), str(HERE / "tensorrt_rtx.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    for name in NAMES[1:]:
        shutil.copy(folder / NAMES[0], folder / name)


class Workshop:
    """The child process; `build` hands it one graph after the other."""

    def __init__(self, folder: Path) -> None:
        _join(folder)
        paths = [str(HERE.parent), str(HOME)]
        env = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
        self._errors = (folder / "stderr").open("w+b")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "parity_tests.tensorrt_rtx"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env,
        )  # fmt: skip

    def ask(self, task: str, **arguments: Any) -> Any:
        """The answer of `task` (a function of TASKS) in a fork of the child."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"the child ended: {self._errors.read()[-2000:].decode(errors='replace')}")
        return json.loads(answer)

    def build(
        self,
        artifact: Path,
        spec: Spec,
        compute: str,
        *,
        exact: bool = False,
        keep: Path | None = None,
        timing: Path | None = None,
    ) -> Built:
        """Parse an artifact's graph and build its engine as a conversion would; `exact` as `load(exact=True)` would.
        keep: a file for the engine. timing: as `engine.build` takes it."""
        files = {k: None if v is None else str(v) for k, v in (("keep", keep), ("timing", timing))}
        given = {"artifact": str(artifact), "spec": dump(spec), "compute": compute, "exact": exact, **files}
        return Built(**self.ask("build", **given))

    def layers(self, artifact: Path) -> dict[str, int]:
        """How many layers of each kind the parser makes of an artifact's graph."""
        return self.ask("layers", artifact=str(artifact))

    def plain(self, model: Path) -> Built:
        """Build an engine of any ONNX file whose shapes are fixed."""
        return Built(**self.ask("plain", model=str(model)))

    def close(self) -> None:
        """End the child."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait(30)
        self._child.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _build(trt: Any, artifact: str, spec: str, compute: str, exact: bool, keep: str | None, timing: str | None) -> Any:
    path, parsed = Path(artifact), parse(read_yaml(spec, artifact), artifact)
    model = graph.exact(path, compute) if exact else None
    bounds = engine.limits(parsed, "f32" if exact else compute)
    file, known = path / graph.FOLDER / graph.MODEL, None if timing is None else Path(timing)
    return _timed(lambda: engine.build(trt, file, bounds, model=model, timing=known), keep)


def _plain(trt: Any, model: str) -> Any:
    return _timed(lambda: engine.build(trt, Path(model), engine.Limits(1, 1, 1)))


def _layers(trt: Any, artifact: str) -> Any:
    network, _parser = engine.parse(trt, trt.Builder(engine.messages(trt)), Path(artifact) / graph.FOLDER / graph.MODEL)
    return Counter(network.get_layer(i).type.name for i in range(network.num_layers))


def _timed(make: Callable[[], Any], keep: str | None = None) -> Any:
    start = time.perf_counter()
    try:
        plan = make()
    except UserError as e:
        return asdict(Built(error=str(e), seconds=time.perf_counter() - start))
    if keep is not None:
        Path(keep).write_bytes(plan)
    return asdict(Built(plan.nbytes, "", time.perf_counter() - start))


def _signatures(trt: Any, wanted: dict[str, list[str]]) -> Any:
    """What NVIDIA's documentation says of these attributes of its classes; none where there is no such attribute."""
    found = {owner: getattr(trt, owner) for owner in wanted}
    return {o: {n: getattr(getattr(found[o], n, None), "__doc__", None) for n in names} for o, names in wanted.items()}


TASKS: dict[str, Callable[..., Any]] = {"build": _build, "plain": _plain, "layers": _layers, "signatures": _signatures}


def main() -> None:
    """Read one task a line, answer it from a fork."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the libraries print is no answer
    trt = importlib.import_module("tensorrt_bindings")
    for line in sys.stdin:
        task = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            answer = TASKS[task.pop("task")](trt, **task)
            os.write(write, json.dumps(answer).encode())
            os._exit(0)  # past the destructors
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            text = pipe.read().decode()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if not text:
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            text = json.dumps(asdict(Built(error=f"the builder ended with {how}")))
        answers.write(text + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
