"""How much is worked on at a time. Results depend on these: whoever changes one changes `driver.VERSION`."""

CHUNK = 4096
"""Tokens that go through a layer together (one window at least)."""
LOGITS = 1 << 24
"""Logits that exist at a time."""
ROWS = 8192
"""Rows of an embedding or head that are rounded together."""
HESSIANS = 1 << 30
"""Bytes of second moments that are collected together, where one alone does not take more: of many experts some at a
time."""
KINDS = 48
"""Hessians of rows of a head, and of an embedding, at most."""
