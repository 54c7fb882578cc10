"""hf: sources and --push, by huggingface_hub's own client against a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from convert.hub import located, small
from convert.push import Push
from convert.tests.conftest import LLAMA, weights, write_checkpoint, write_huggingface
from convert.tests.fakehub import COMMIT, TOKEN, Hub, running
from spec import Spec, UserError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as found:
        yield found


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """`convert` in a process that takes our Hub for the Hub."""

    def command(*args: object, module: str = "convert", token: str = TOKEN, **env: str) -> tuple[int, str, str]:
        settings = {
            "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(Path.cwd()), "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1", **({"HF_TOKEN": token} if token else {}), **env,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, args)], capture_output=True, text=True, cwd=tmp_path, env=settings,
            timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return command


def test_a_repository_is_a_source(hub: Hub, run: Run, tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "local", LLAMA, shards=2)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# it\n")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    hub.publish("owner/small-model", folder)
    hub.cut.add("model-00001-of-00002.safetensors")
    status, said, errors = run("hf:owner/small-model", "--quant", "q8", "--no-verify")
    assert status == 0, errors
    made = tmp_path / "small-model.q8.gguf"
    assert made.is_file() and str(made.name) in said
    cut = f"GET /owner/small-model/resolve/{COMMIT}/model-00001-of-00002.safetensors"
    assert hub.log.count(cut) == 2  # the first answer broke off
    assert not any("pytorch_model" in line or "evil" in line for line in hub.log)
    receipt = json.loads((tmp_path / "small-model.q8.gguf.receipt.json").read_text())
    assert receipt["source"]["repo"] == "owner/small-model" and receipt["source"]["revision"] == COMMIT
    card = (tmp_path / "small-model.q8.gguf.md").read_text()
    for part in ("license: apache-2.0", "base_model: owner/small-model", "base_model_relation: quantized",
                 f"--source hf:owner/small-model@{COMMIT}"):  # fmt: skip
        assert part in card
    hub.log.clear()
    status, _, errors = run("hf:owner/small-model", "--quant", "q4", "--no-verify", HF_HUB_OFFLINE="1")
    assert status == 0, errors  # what is cached whole needs no network
    assert not hub.log


@pytest.mark.slow
def test_a_pickle_is_fetched_where_there_is_nothing_else(hub: Hub, run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = write_huggingface(tmp_path / "local", LLAMA)
    state = {n: torch.from_numpy(w) for n, w in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    hub.publish("owner/old", folder)
    status, said, errors = run("hf:owner/old@main", "--check")
    assert status == 0 and "old.q4.gguf" in said, errors


@pytest.mark.slow
def test_an_adapter_of_a_repository(hub: Hub, run: Run, tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {k: v for k, v in LLAMA.items() if k not in ("architectures", "model_type", "torch_dtype")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config))
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "lora")
    hub.publish("owner/lora", tmp_path / "lora")
    status, _, errors = run("base", "--adapter", "hf:owner/lora", "--quant", "q8", "--out", "x.gguf")
    assert status == 0, errors  # verified, with the adapter merged again by the child
    (named,) = json.loads((tmp_path / "x.gguf.receipt.json").read_text())["source"]["adapters"]
    assert named["repo"] == "owner/lora" and named["revision"] == COMMIT and len(named["sha256"]) == 64
    again = ("x.gguf", "--source", "base", "--level", "q8", "--json")
    status, said, _ = run(*again, "--adapter", "lora", module="convert.verify")
    assert status == 0, said


@pytest.mark.parametrize(
    ("source", "token", "says"),
    [
        ("hf:owner/nothing", TOKEN, "hf:owner/nothing: there is no such repository, or it is private"),
        ("hf:owner/gated", "", "hf:owner/gated: the repository is gated: ask for access on its page"),
        ("hf:owner/small@v9", TOKEN, "hf:owner/small@v9: the repository has no such branch, tag or commit"),
        ("hf:owner/small@../../refs", TOKEN, "a source on the Hub is hf:owner/name or hf:owner/name@revision"),
        ("hf:owner", TOKEN, "a source on the Hub is hf:owner/name or hf:owner/name@revision"),
        ("hf:owner/empty", TOKEN, "neither spec.yaml (our checkpoint) nor config.json (Hugging Face) is in it"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(
    hub: Hub, run: Run, tmp_path: Path, source: str, token: str, says: str
) -> None:
    folder = write_huggingface(tmp_path / "local", LLAMA)
    hub.publish("owner/small", folder)
    hub.publish("owner/gated", folder)
    hub.gated.add("owner/gated")
    hub.repos["owner/empty"] = {"README.md": b"# nothing"}
    status, said, errors = run(source, "--check", token=token)
    assert status == 2 and not said
    (line,) = errors.splitlines()
    assert line.startswith("convert: ") and says in line


def test_no_network_is_one_line(run: Run) -> None:
    for env in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        status, _, errors = run("hf:owner/small", "--check", **env)
        (line,) = errors.splitlines()
        assert status == 2 and "the Hub cannot be reached, and no whole copy is in the cache" in line


def test_a_push_without_a_network_is_told_before_the_work(run: Run, tmp_path: Path, small: Spec) -> None:
    trained(tmp_path / "run", small)
    status, _, errors = run("run", "--push", "owner/made", HF_ENDPOINT="http://127.0.0.1:9")
    (line,) = errors.splitlines()
    assert status == 2 and "--push owner/made: the Hub cannot be reached (" in line


def trained(folder: Path, small: Spec) -> Path:
    write_checkpoint(folder, small, weights(small))
    (folder / "LICENSE").write_text("the licence\n")
    (folder / "training").mkdir()
    (folder / "training" / "config.yaml").write_text("data:\n  source: stdlib\nsteps: 40\nseed: 3\n")
    steps: list[dict[str, Any]] = [{"step": 39, "loss": 2.0, "tokens": 900, "val_loss": 2.5, "val_bits_per_byte": 1.25},
                                   {"step": 40, "loss": 2.0, "tokens": 1000}]  # fmt: skip
    (folder / "training" / "train.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps) + '{"cut')
    return folder


def test_what_passed_is_pushed(hub: Hub, run: Run, tmp_path: Path, small: Spec) -> None:
    trained(tmp_path / "run", small)
    status, said, errors = run("run", "--quant", "q8", "--push", "owner/made", "--private", "--check", token="")
    assert status == 0 and not hub.log, errors  # a dry run asks nobody
    assert "would push" in said and "owner/made (private, if it is new): run.q8.gguf, README.md, LICENSE" in said
    status, said, errors = run("run", "--quant", "q8", "--push", "owner/made", "--private")
    assert status == 0, errors
    assert f"pushed         {hub.address}/owner/made/commit/{COMMIT}" in said
    files = hub.repos["owner/made"]
    assert set(files) == {"run.q8.gguf", "run.q8.gguf.receipt.json", "README.md", "LICENSE"}
    assert files["run.q8.gguf"] == (tmp_path / "run.q8.gguf").read_bytes()
    receipt = json.loads(files["run.q8.gguf.receipt.json"])
    assert hub.tags == {f"q8-{receipt['weights_hash'][:12]}": COMMIT}
    assert hub.made[0]["name"] == "made" and "rivate" in json.dumps(hub.made[0])
    card = files["README.md"].decode()
    for part in ("license: other", "license_link: LICENSE", "pipeline_tag: text-generation", "- gguf", "- q8",
                 "| data | the Python standard library's source |", "| tokens seen | 1,000 |",
                 "| validation loss | 2.5000 nats/token at step 39 |", "| packing | PASS", "```yaml", "vocab_size: 96",
                 "llama-cli -m run.q8.gguf", "Made with python"):  # fmt: skip
        assert part in card, part
    status, _, errors = run("run", "--quant", "q8", "--push", "owner/made", "--force")
    assert status == 0, errors  # the same again changes nothing that is there


@pytest.mark.slow
def test_several_artifacts_under_one_card(hub: Hub, run: Run, tmp_path: Path, small: Spec) -> None:
    pytest.importorskip("transformers")
    trained(tmp_path / "run", small)
    status, _, errors = run("run", "--to", "gguf,hf", "--quant", "f16", "--push", "owner/both")
    assert status == 0, errors
    files = hub.repos["owner/both"]
    folder = {f"run.f16-hf/{n}" for n in ("config.json", "model.safetensors", "README.md", "LICENSE")}
    file = {"run.f16.gguf", "run.f16.gguf.receipt.json", "run.f16.gguf.md"}
    assert folder | file | {"README.md", "LICENSE"} <= set(files)
    card = files["README.md"].decode()
    assert "[run.f16-hf/README.md](run.f16-hf/README.md)" in card and "6 PASS, 1 NOT_RUN" in card


@pytest.mark.slow
def test_a_folder_alone_is_the_repository(hub: Hub, run: Run, tmp_path: Path, small: Spec) -> None:
    pytest.importorskip("transformers")
    trained(tmp_path / "run", small)
    status, _, errors = run("run", "--to", "hf", "--quant", "f32", "--push", "owner/alone")
    assert status == 0, errors
    files = hub.repos["owner/alone"]
    assert "config.json" in files and 'from_pretrained("owner/alone")' in files["README.md"].decode()
    status, _, errors = run("hf:owner/alone", "--quant", "q8", "--no-verify")
    assert status == 0 and (tmp_path / "alone.q8.gguf").is_file(), errors


def test_a_push_that_cannot_be_is_told_before_the_work(hub: Hub, run: Run, tmp_path: Path, small: Spec) -> None:
    trained(tmp_path / "run", small)
    for args, token, says in (
        (("--push", "made"), TOKEN, "a repository is owner/name"),
        (("--push", "owner/made", "--no-verify"), TOKEN, "only what was verified is uploaded"),
        (("--push", "owner/made"), "", "--push owner/made: no token"),
        (("--push", "owner/made"), "hf_wrong", "the Hub answered 401 (the token is not valid"),
        (("--private",), TOKEN, "--private: says how --push makes a repository"),
    ):
        status, said, errors = run("run", *args, token=token)
        (line,) = errors.splitlines()
        assert status == 2 and says in line and not said, errors
        assert not list(tmp_path.glob("*.gguf*"))


def test_a_push_that_fails_loses_nothing(hub: Hub, run: Run, tmp_path: Path, small: Spec) -> None:
    trained(tmp_path / "run", small)
    hub.read_only = True
    status, _, errors = run("run", "--quant", "q8", "--push", "owner/made")
    assert status == 2 and (tmp_path / "run.q8.gguf").is_file()
    last = errors.splitlines()[-1]
    assert "not uploaded (run.q8.gguf: written all the same): the Hub answered 403 (the token may not do this" in last


@pytest.mark.parametrize("repo", ["", "made", "a/b/c", "../x", "owner/..", "owner/a--b", "owner/x.", "o wner/x", "-/x"])
def test_names_that_are_no_repository(repo: str) -> None:
    with pytest.raises(UserError, match="a repository is owner/name"):
        Push(repo).check()


def test_what_a_folder_is_read_for_is_fetched() -> None:
    wanted = small()
    for name in ("tekken.json", "sentencepiece.bpe.model", "tiktoken.model", "additional_chat_templates/rag.jinja",
                 "USE_POLICY.md", "COPYING"):  # fmt: skip
        assert any(fnmatch(name, p) for p in wanted), name
    assert not any(fnmatch(name, p) for name in ("modeling_x.py", "optimizer.pt", "model.gguf") for p in wanted)


def test_folders_are_where_they_are(tmp_path: Path) -> None:
    assert located(tmp_path) == tmp_path and located("a/b") == Path("a/b")
