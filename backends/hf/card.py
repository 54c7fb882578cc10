"""How a folder is used with its own client: the Python for its model card."""

from __future__ import annotations

LANGUAGE = "python"

_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
"""


def snippet(name: str) -> str:
    """Python that generates text from a folder called `name`."""
    return _CODE.format(name=name)
