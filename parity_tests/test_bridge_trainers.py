"""transformers' Trainer, PEFT and TRL train a spec, each for a few steps, and what they save converts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.cli import main as convert
from convert.sources import open_source
from parity_tests.cases import FEATURES
from parity_tests.checkpoints import VOCAB, tokenizer_json
from spec import Spec, parse
from spec.config import merge

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from backends.torch.transformers import AllotropeConfig, AllotropeForCausalLM

torch.set_num_threads(1)

TEXT = [f"def f{n}(x):\n    return x + {n * n}" + "\n\nprint(f(1))" * (n % 3) for n in range(32)]


def spec_of(name: str, **patch: Any) -> Spec:
    """A feature's spec with the tokenizer's vocabulary."""
    data = FEATURES[name].model_dump(mode="json", exclude_unset=True)
    return parse(merge(merge(data, {"vocab_size": VOCAB, "context": 64}), patch), name)


def fresh(spec: Spec) -> Any:
    set_seed(3)
    return AllotropeForCausalLM(AllotropeConfig(spec=spec))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    ends = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json()), **ends)


def arguments(out: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, **more,
    }  # fmt: skip


def train(model: Any, tokenizer: Any, out: Path, resume: Path | None = None, **more: Any) -> list[float]:
    """transformers' Trainer; the loss of every step."""
    rows = [tokenizer(t, return_token_type_ids=False) for t in TEXT]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(out, **more)),
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows[:4],  # type: ignore[arg-type]
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return losses(trainer)


def losses(trainer: Any) -> list[float]:
    return [step["loss"] for step in trainer.state.log_history if "loss" in step]


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "tied", "moe"])
def test_trainer_trains_saves_and_resumes_to_the_bit(tmp_path: Path, tokenizer: Any, name: str) -> None:
    spec = spec_of(name, block={"dropout": 0.1})
    every = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole, resumed = fresh(spec), fresh(spec)
    seen = train(whole, tokenizer, tmp_path / "a", **every)
    assert seen[-1] < seen[0] - 0.3
    again = train(resumed, tokenizer, tmp_path / "b", tmp_path / "a" / "checkpoint-2", **every)
    assert again == seen and equal(whole, resumed)
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert equal(whole, back)


def test_accumulation_checkpointing_and_padding_do_not_change_the_step(tmp_path: Path, tokenizer: Any) -> None:
    """The loss is divided by the valid tokens of the whole step."""
    spec = spec_of("llama")
    models = [fresh(spec) for _ in range(3)]
    whole = train(models[0], tokenizer, tmp_path / "a", per_device_train_batch_size=8)
    split = train(models[1], tokenizer, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    less = train(models[2], tokenizer, tmp_path / "c", per_device_train_batch_size=8, activation_checkpointing=True)
    assert less == whole and equal(models[0], models[2])
    assert np.allclose(split, whole, rtol=1e-4)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (p - q).abs().max() < 1e-3  # Adam amplifies rounding where a gradient is nearly 0


def test_bf16_training_is_float32_training_rounded(tmp_path: Path, tokenizer: Any) -> None:
    spec = spec_of("llama")
    exact, half = fresh(spec), fresh(spec)
    a = train(exact, tokenizer, tmp_path / "a")
    b = train(half, tokenizer, tmp_path / "b", bf16=True)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert a != b and np.allclose(a, b, atol=0.02)


@pytest.mark.slow
def test_what_trainer_saves_converts(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.chdir(tmp_path)
    model = fresh(spec_of("llama", width=64, context=256))
    train(model, tokenizer, tmp_path / "run", save_steps=4)
    with pytest.raises(SystemExit) as done:
        convert([str(tmp_path / "run" / "checkpoint-4"), "--to", "gguf,hf", "--quant", "q8", "--out", "shipped"])
    assert done.value.code == 0
    assert {p.name for p in (tmp_path / "shipped").iterdir()} >= {"checkpoint-4.q8.gguf", "checkpoint-4.q8-hf"}


# PEFT


def adapted(model: Any, **config: Any) -> Any:
    peft = pytest.importorskip("peft")
    set_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **config))


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "named": ("llama", {"target_modules": ["q", "v"]}),
    "all-linear": ("neox", {"target_modules": "all-linear"}),
    "embedding": ("llama", {"target_modules": ["embed", "q"]}),
    "whole embedding": ("tied", {"target_modules": ["q"], "modules_to_save": ["embed"]}),
    "experts": ("moe", {"target_modules": "all-linear", "target_parameters": ["mlp.experts.up.weight"]}),
}


@pytest.mark.parametrize(("name", "config"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_is_saved_read_and_merged_here_and_in_convert(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    spec = spec_of(name)
    model = adapted(fresh(spec), init_lora_weights=False, **config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn_like(p)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        fresh_logits, logits = fresh(spec).eval()(ids).logits, model(ids).logits
        assert (logits - fresh_logits).abs().max() > 0.01
        model.save_pretrained(tmp_path / "adapter")
        from peft import PeftModel

        read = PeftModel.from_pretrained(fresh(spec), tmp_path / "adapter").eval()
        assert (read(ids).logits - logits).abs().max() < 1e-4
        merged = model.merge_and_unload()
        assert isinstance(merged, AllotropeForCausalLM)
        assert (merged(ids).logits - logits).abs().max() < 1e-4
        merged.save_pretrained(tmp_path / "merged")
        back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert equal(back, merged) and (back(ids).logits - logits).abs().max() < 1e-4
    fresh(spec).save_pretrained(tmp_path / "base")
    if "target_parameters" in config:
        with pytest.raises(ValueError, match="target_parameters"):
            open_source(tmp_path / "base", [tmp_path / "adapter"])
        return
    with open_source(tmp_path / "base", [tmp_path / "adapter"]) as source:
        for key, value in merged.state_dict().items():
            assert np.allclose(source.tensor(key), value.numpy(), atol=1e-6), key


def test_an_adapter_that_a_tied_head_would_not_follow_is_refused() -> None:
    model = adapted(fresh(spec_of("tied")), target_modules=["embed"])
    with pytest.raises(ValueError, match="the head is tied to it, and would not follow its adapter"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_trainer_trains_an_adapter_that_converts(tmp_path: Path, tokenizer: Any, checkpointed: bool) -> None:
    """`convert --adapter` merges what PEFT merges."""
    fresh(spec_of("llama")).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base: Any = AllotropeForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules="all-linear")
    seen = train(model, tokenizer, tmp_path / "run", save_steps=4, activation_checkpointing=checkpointed)
    assert seen[-1] < seen[0]
    merged = model.merge_and_unload().state_dict()
    with open_source(tmp_path / "base", [tmp_path / "run" / "checkpoint-4"]) as source:
        for name in source.names():
            assert np.allclose(source.tensor(name), merged[name].numpy(), atol=1e-6), name


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # ours are a row's own anyway
def test_virtual_tokens_train_and_generate(tokenizer: Any) -> None:
    """Prompt tuning goes through embeddings, prefix tuning through the cache; left-padded rows are each row's own."""
    peft = pytest.importorskip("peft")
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        set_seed(5)
        model: Any = peft.get_peft_model(fresh(spec_of("alibi")), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
        batch = tokenizer(["def f", "return x"], return_tensors="pt", padding=True, padding_side="left")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        model.eval()
        options = {"max_new_tokens": 5, "do_sample": False}
        together = model.generate(**inputs, **options)
        for row, mask in enumerate(inputs["attention_mask"]):
            ids = inputs["input_ids"][row][mask == 1][None]
            alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            assert together[row, -5:].tolist() == alone[0, -5:].tolist()


# TRL


def sft(model: Any, tokenizer: Any, out: Path, **more: Any) -> list[float]:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    peft_config = more.pop("peft_config", None)
    args = SFTConfig(**arguments(out, bf16=False, **more))
    data = Dataset.from_list([{"text": t} for t in TEXT])
    trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize("name", ["llama", "tied", "head_bias", "logit_softcap", "logit_scale"])
def test_trls_fused_loss_is_the_models(name: str) -> None:
    """TRL multiplies hidden states by the head itself: scale, softcap, bias and tie included."""
    pytest.importorskip("trl")
    from trl.trainer.utils import add_fused_lm_head

    model = fresh(spec_of(name)).train()
    ids = torch.arange(40).view(2, 20)
    runs = []
    for fused in (False, True):
        if fused:
            add_fused_lm_head(model)
        loss = model(ids, labels=ids, **({"fused_lm_head": True} if fused else {})).loss
        model.zero_grad()
        loss.backward()
        runs.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(runs[0][0], runs[1][0], rtol=1e-6)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_sft_trains_whole_models_adapters_and_packed_rows(tmp_path: Path, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    spec = spec_of("llama")
    plain = sft(fresh(spec), tokenizer, tmp_path / "a")
    split = sft(fresh(spec), tokenizer, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    lora = sft(fresh(spec), tokenizer, tmp_path / "c", peft_config=peft.LoraConfig(r=4, target_modules="all-linear"))
    packed = sft(fresh(spec), tokenizer, tmp_path / "d", packing=True, max_length=64)
    moe = sft(fresh(spec_of("moe")), tokenizer, tmp_path / "e")
    assert np.allclose(split, plain, rtol=1e-4)
    for seen in (plain, lora, packed, moe):
        assert seen[-1] < seen[0]


def test_dpo_trains(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    data = Dataset.from_list([{"prompt": "def f", "chosen": "(x):", "rejected": " = 1"}] * 16)
    fresh(spec_of("llama")).save_pretrained(tmp_path / "base")
    args = DPOConfig(**arguments(tmp_path / "run", bf16=False))
    trainer = DPOTrainer(str(tmp_path / "base"), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
