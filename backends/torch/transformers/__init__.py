"""A spec's decoder as a transformers model, so that Trainer, PEFT and TRL train it as they train any other.

Importing this package registers the model type `allotrope` with transformers' auto classes; no code is ever loaded from
a model's folder.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from backends.torch.transformers.config import AllotropeConfig
from backends.torch.transformers.model import AllotropeForCausalLM

AutoConfig.register(AllotropeConfig.model_type, AllotropeConfig, exist_ok=True)
AutoModelForCausalLM.register(AllotropeConfig, AllotropeForCausalLM, exist_ok=True)

__all__ = ["AllotropeConfig", "AllotropeForCausalLM"]
