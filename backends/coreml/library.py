"""coremltools, imported once and quietly."""

from __future__ import annotations

import logging
import warnings
from functools import lru_cache, partial
from typing import Any


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools as ct
            from coremltools.converters.mil import Builder  # noqa: F401
            from coremltools.converters.mil.frontend.milproto import load  # noqa: F401
            from coremltools.converters.mil.mil.passes import pass_pipeline
    finally:
        logger.setLevel(max(before, logging.ERROR))
    pass_pipeline.tqdm = partial(pass_pipeline.tqdm, disable=True)
    return ct
