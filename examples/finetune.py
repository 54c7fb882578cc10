"""Fine-tune a checkpoint on a text with transformers' Trainer and a LoRA adapter of PEFT; merge it; save a folder.

    python examples/finetune.py runs/tiny notes.txt --out tuned --steps 200
    convert tuned --to gguf,mlx,onnx --quant q4

Needs `pip install 'allotrope[bridge]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from backends.torch.transformers import AllotropeForCausalLM


def blocks(tokenizer: Any, text: str, length: int) -> list[dict[str, list[int]]]:
    """The text in rows of `length` tokens, each its own labels; what is left over at the end is dropped."""
    ids = tokenizer(text)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; the mean loss over all steps, in nats a token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder of `python -m train` or of save_pretrained")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tuned"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--rank", type=int, default=16)
    chosen = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(chosen.checkpoint)
    base = AllotropeForCausalLM.from_pretrained(chosen.checkpoint)
    lora = peft.LoraConfig(r=chosen.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    options = TrainingArguments(
        output_dir=str(chosen.out / "training"),
        max_steps=chosen.steps,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
        save_strategy="no",
    )
    rows: Any = blocks(tokenizer, chosen.text.read_text(encoding="utf-8"), chosen.length)
    trainer = Trainer(model, options, train_dataset=rows, data_collator=default_data_collator)
    loss = trainer.train().training_loss

    merged: Any = model.merge_and_unload()
    merged.save_pretrained(chosen.out)
    tokenizer.save_pretrained(chosen.out)
    return loss


if __name__ == "__main__":
    main()
