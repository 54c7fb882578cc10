"""The 16-bit control of the arithmetic gate is PyTorch's own error at that dtype, without PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backends.numpy.model import Oracle
from backends.torch.model import Decoder
from convert.verify.emulate import ROUNDINGS, RoundedOps
from convert.verify.metrics import nmse, typical
from convert.verify.routes import mixtures
from parity_tests.cases import FEATURES, random_ids, random_weights

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_the_control_is_as_large_as_torchs_error(name: str, dtype: str) -> None:
    """Measured: 0.76 to 1.39 of it, median 1.0; at 2, three times the control would no longer mean what it says. Of
    mixtures the median token, since the two do not turn the same routes."""
    spec = FEATURES[name]
    weights = {n: ROUNDINGS[dtype](w) for n, w in random_weights(spec).items()}
    ids = random_ids(spec, 1, 40)
    exact = Oracle(spec, weights).logits(ids)
    measure = typical if mixtures(spec) else nmse
    control = measure(Oracle(spec, weights, ops=RoundedOps(compute=dtype, kv=dtype)).logits(ids), exact)
    model = Decoder(spec).to(DTYPES[dtype]).eval()
    model.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in weights.items()})
    got = measure(model(torch.from_numpy(ids)).double().numpy(), exact)
    assert 0.5 < got / control < 2
