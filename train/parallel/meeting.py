"""Where ranks find each other."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

PATIENCE = timedelta(minutes=10)
"""How long ranks wait for each other to start."""


def fresh_store() -> Store | None:
    """A store that no earlier start of these ranks has written to; none where torch's own is.

    torchrun's store outlives the ranks that it starts again, and keeps what they wrote: a new rank may read the address
    of one that is gone. So rank 0 opens another, and tells its port under a word that the asking process made up.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    host = os.environ["MASTER_ADDR"]
    shared = TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
    if rank > 0:
        word = uuid.uuid4().hex
        shared.set(f"meeting/{rank}", word)
        store = TCPStore(host, int(shared.get(f"meeting/{word}")), world, is_master=False, timeout=PATIENCE)
        store.add("here", 1)
        return store
    store = TCPStore(host, 0, world, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    until = time.monotonic() + PATIENCE.total_seconds()
    while (here := store.add("here", 0)) < world - 1:
        if time.monotonic() > until:
            raise TimeoutError(f"{here + 1} of {world} ranks came within {PATIENCE}")
        for other in range(1, world):
            if shared.check([f"meeting/{other}"]):  # it may be a word of one that is gone: the answer harms nobody
                shared.set(f"meeting/{shared.get(f'meeting/{other}').decode()}", str(store.port))
        time.sleep(0.02)
    return store
