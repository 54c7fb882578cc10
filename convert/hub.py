"""The Hugging Face Hub as a source: `hf:owner/name[@revision]` becomes a folder of the Hub's own cache.

The cache calls a folder after its repository and commit, so the receipt knows both (`sources.base.hub_origin`). An
interrupted download goes on where it stopped; the token is the one that `hf auth login` or HF_TOKEN gave; without a
network, what is cached whole is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spec.errors import UserError

PREFIX = "hf:"
NAME = r"[A-Za-z0-9][\w.-]{0,95}"
SMALL = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "adapter_config.json", "spec.yaml", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*", "README.md",
)  # fmt: skip
"""Configs, tokenizers and cards; `small` has the rest. No code: nothing of a repository is ever run."""
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "adapter_model.bin")
"""Fetched only where there is no safetensors file."""


def located(source: str | Path) -> Path:
    """The folder of a source. One on the Hub is downloaded, pinned to a commit. Raises `UserError`."""
    text = str(source)
    if not text.startswith(PREFIX):
        return Path(source)
    found = re.fullmatch(rf"{PREFIX}({NAME}/{NAME})(?:@([\w./-]+))?", text)
    if found is None or ".." in text:
        raise UserError(f"{text}: a source on the Hub is hf:owner/name or hf:owner/name@revision")
    repo, revision = found[1], found[2]
    from huggingface_hub import snapshot_download

    with explained(text, ", and no whole copy is in the cache"):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*small(), *WEIGHTS]))
        if not any(p.suffix == ".safetensors" for p in folder.iterdir()):
            snapshot_download(repo, revision=folder.name, allow_patterns=list(PICKLES))
    return folder


def small() -> list[str]:
    """Patterns of the files beside the weights that are read from a folder."""
    from convert import provenance, templates, vocabularies

    return [*SMALL, *vocabularies.FILES, f"{templates.FOLDER}/*.jinja", *provenance.LICENCES]


@contextmanager
def explained(what: str, unreached: str = "") -> Iterator[None]:
    """What goes wrong between here and the Hub, in one line. unreached: what more to say where there is no network."""
    import httpx2
    from huggingface_hub import errors
    from huggingface_hub.utils import logging as chatter

    before = chatter.get_verbosity()
    chatter.set_verbosity_error()  # its remarks on patterns that match nothing, on tokens, on the cache
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{what}: the repository is gated: ask for access on its page, then `hf auth login` or set "
                        "HF_TOKEN") from None  # fmt: skip
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what}: there is no such repository, or it is private (`hf auth login` or set HF_TOKEN)"
                        ) from None  # fmt: skip
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: the repository has no such branch, tag or commit") from None
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        hint = {401: " (the token is not valid: `hf auth login` or set HF_TOKEN)",
                403: " (the token may not do this: it needs write access)"}.get(status, "")  # fmt: skip
        raise UserError(f"{what}: the Hub answered {status}{hint}: {_first(e.server_message or str(e))}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.HTTPError) as e:
        reason = _first(str(e.__cause__ or e))
        raise UserError(f"{what}: the Hub cannot be reached{unreached} ({reason})") from None
    except OSError as e:
        raise UserError(f"{what}: {e.filename or ''} {e.strerror or e}".replace("  ", " ")) from None
    finally:
        chatter.set_verbosity(before)


def _first(text: str) -> str:
    return " ".join(text.split())[:160]
