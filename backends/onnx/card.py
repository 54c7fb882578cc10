"""How a folder is used with its own client: the Python for its model card."""

from __future__ import annotations

LANGUAGE = "python"

_CODE = """\
import onnxruntime_genai as og
from tokenizers import Tokenizer

model = og.Model("{name}")
tokenizer = Tokenizer.from_file("{name}/tokenizer.json")
params = og.GeneratorParams(model)
params.set_search_options(max_length=64)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time").ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""


def snippet(name: str) -> str:
    """Python that generates text from a folder called `name`."""
    return _CODE.format(name=name)
