"""`--push owner/name`: what a conversion made, to the Hugging Face Hub, in one commit and under one tag.

One artifact's files go to the repository's root, so that clients find a folder there; several go under their own names,
with a card that lists them. The tag is the level and the beginning of the weights' hash.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import Backend
from convert import card, output
from convert.hub import NAME, explained
from convert.provenance import Provenance
from spec.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from convert.pipeline import Result


@dataclass(frozen=True)
class Push:
    """Where to, and whether a repository that does not exist yet is made a private one."""

    repo: str
    private: bool = False

    def check(self) -> None:
        """Raises `UserError` for what is no repository's name."""
        if not re.fullmatch(f"{NAME}/{NAME}", self.repo) or re.search(r"--|\.\.|[.-](/|$)", self.repo):
            raise UserError(f"--push {self.repo}: a repository is owner/name, of letters, digits, '-', '_' and '.'")

    def ready(self, api: HfApi | None = None) -> None:
        """Ask the Hub who we are, before any work is done. Raises `UserError`."""
        from huggingface_hub import errors

        with explained(f"--push {self.repo}"):
            try:
                (api or _api()).whoami()
            except errors.LocalTokenNotFoundError:
                raise UserError(f"--push {self.repo}: no token (`hf auth login` or set HF_TOKEN)") from None

    def expected(self, results: Sequence[Result], made: Sequence[Backend], known: Provenance) -> str:
        """What would be uploaded, for a dry run."""
        under = "/*" if len(results) > 1 else "'s files"
        artifacts = [r.out.name + ("" if b.suffix else under) for r, b in zip(results, made, strict=True)]
        names = [*artifacts, card.INSIDE, *(p.name for p in known.licences)]
        size = sum(r.size for r in results)
        where = f"{self.repo}{' (private, if it is new)' if self.private else ''}"
        return f"{where}: {', '.join(names)}, about {size / 1e6:,.1f} MB; tag {results[0].level}-<weights' hash>"

    def __call__(
        self, results: Sequence[Result], made: Sequence[Backend], known: Provenance, api: HfApi | None = None
    ) -> str:
        """Upload what `results` name, all of it verified. Returns the commit's address. Raises `UserError`, which says
        that the artifacts are there all the same."""
        from huggingface_hub import CommitOperationAdd

        hub = api or _api()
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files(results, made, self.repo, known).items()
        ]
        level, receipt = results[0].level, results[0].receipt
        digest = receipt["weights_hash"] or receipt["source"]["hash"]
        what = ", ".join(r.out.name for r in results)
        with explained(f"--push {self.repo}: not uploaded ({what}: written all the same)"):
            hub.create_repo(self.repo, private=self.private or None, exist_ok=True)
            commit = hub.create_commit(self.repo, operations, commit_message=f"Upload {what}")
            hub.create_tag(self.repo, tag=f"{level}-{digest[:12]}", revision=commit.oid, exist_ok=True)
        return str(commit.commit_url)


def files(results: Sequence[Result], made: Sequence[Backend], repo: str, known: Provenance) -> dict[str, Path | bytes]:
    """What a repository gets: names in it, and files here or contents."""
    out: dict[str, Path | bytes] = {p.name: p for p in known.licences}
    for r, backend in zip(results, made, strict=True):
        root = f"{r.out.name}/" if backend.suffix or len(results) > 1 else ""
        if r.out.is_dir():
            out |= {root + p.relative_to(r.out).as_posix(): p for p in sorted(r.out.rglob("*")) if p.is_file()}
        else:
            out[r.out.name] = r.out
        if backend.suffix:
            receipt = output.receipt_beside(r.out)
            out[receipt.name] = receipt
            if len(results) > 1:
                out[card.beside(r.out).name] = card.beside(r.out)
    if len(results) > 1:
        text = card.index(results, made, repo, known)
    else:
        called = repo if made[0].hub else ""
        text = card.card(results[0], made[0], results[0].receipt, results[0].report, known, called)
    return out | {card.INSIDE: text.encode()}


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="allotrope")
