"""Hugging Face: a folder that `transformers.AutoModelForCausalLM.from_pretrained` opens, by an architecture of its own.

transformers owns its graphs, so a spec is carried by the architecture whose modeling code computes it (`carriers`),
after exact rewrites where they help (`fit`), under its names (`names`) and with the keys that it reads (`config`).
"""
