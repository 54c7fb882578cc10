"""coremltools, imported once and quietly."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect afterwards: bare `except:` clauses in the imports would swallow them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: kept.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        for number in kept:
            signal.raise_signal(number)


@lru_cache(maxsize=1)
def coremltools() -> Any:
    """The module.

    Importing it reports through its logger that torch's version is untested (no torch model is converted here) and that
    Apple's framework is missing (it is, off macOS: then the interpreter runs programs). Its passes draw progress bars.
    Its SWIG-era extension types lack `__module__`, which Python 3.11 and later deprecate; and it does arithmetic with
    NumPy booleans and shape-setting that NumPy 2.4 deprecates. None of that can be acted on.
    """
    logger = logging.getLogger("coremltools")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), _interrupts_kept():
            warnings.simplefilter("ignore")
            import coremltools as ct
            from coremltools.converters.mil import Builder  # noqa: F401
            from coremltools.converters.mil.frontend.milproto import load  # noqa: F401
            from coremltools.converters.mil.mil.passes import pass_pipeline
    finally:
        logger.setLevel(max(before, logging.ERROR))
    pass_pipeline.tqdm = partial(pass_pipeline.tqdm, disable=True)
    return ct
