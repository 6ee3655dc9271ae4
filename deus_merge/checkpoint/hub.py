"""A model reference -> a local folder: a folder as it is, or ``org/name[@revision]`` from the hub or its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

from ..core.errors import CheckpointError
from ..core.text import some_of
from ..core.urls import is_url
from .header import refuse_gguf

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)

#: Begins a reference to a model whose folder is not written, in files that people share.
PRIVATE = "<private>/"
#: The files that a merge reads of a repository. Weights in other formats are not downloaded.
NEEDED = (
    "config.json",
    "adapter_config.json",
    "deus_merge.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "normalizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "SYSTEM_PROMPT.txt",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "vocab.bpe",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_[A-Z]*/*",
    "*.py",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY.md",
    "*.safetensors",
    "*.safetensors.index.json",
)
#: The hub's ``*`` also matches ``/``; of folders, those of `side_files.PART` are left. ``consolidated`` is a second
#: copy of the weights in the format of their authors.
UNNEEDED = ("[!0-9a]*/*", "a[!d]*/*", "ad[!d]*/*", "[0-9][!_]*/*", "*/*/*", "*/*.onnx", "consolidated*")
#: Also needed of a repository without safetensors, where pickles are allowed.
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def resolve(
    ref: str,
    *,
    cache_dir: Path | str | None = None,
    offline: bool | None = None,
    pickle: bool = False,
    weights: bool = True,
) -> Path:
    """The local folder of a model.

    Args:
        ref: A folder, or ``org/name`` on the hub with an optional ``@revision`` (branch, tag or commit). A folder of
            that name takes precedence.
        cache_dir: The hub's cache; by default where huggingface_hub keeps it.
        offline: Use only the cache; by default ``HF_HUB_OFFLINE`` decides.
        pickle: Also fetch pickled weights, of a repository that has no others.
        weights: Whether weights are needed at all.

    Returns:
        The folder: for the hub, the snapshot in the cache with what a merge needs.

    Raises:
        CheckpointError: no such folder; or no such repository, revision, right or connection.
    """
    path = _local(ref)
    if path is not None:
        if not path.is_dir():
            if path.suffix.lower() == ".gguf":
                refuse_gguf(path)
            raise CheckpointError(
                "not a folder",
                where=ref,
                expected="the folder of a model",
                got="a file",
                hint=f"name its folder: {path.parent}",
            )
        return _snapshot(path.absolute())
    repository, revision = split_revision(ref)
    if not weights:
        patterns = tuple(p for p in NEEDED if "safetensors" not in p)
        return _download(ref, repository, revision, cache_dir, offline, patterns)
    folder = _download(ref, repository, revision, cache_dir, offline, NEEDED)
    if pickle and not any(folder.glob("*.safetensors")):
        folder = _download(ref, repository, revision, cache_dir, offline, NEEDED + PICKLED)
    return folder


def split_revision(ref: str) -> tuple[str, str | None]:
    """``org/name[@revision]`` -> the repository and the revision.

    Raises:
        CheckpointError: it has not this form.
    """
    repository, at, revision = ref.partition("@")
    if at and _local(repository) is not None:
        raise CheckpointError(
            "a local folder has no revisions", where=ref, got=f"@{revision}", hint=f"remove @{revision}"
        )
    if ref.startswith(PRIVATE):
        raise CheckpointError(
            "the recipe does not say where this model is, since it was written to be shared",
            where=ref,
            expected="a folder, or org/name[@revision] on the hub",
            hint=f"--model '{ref}=FOLDER' names it",
        )
    if not _is_repository(repository):
        raise CheckpointError("no such folder", where=ref, expected="a folder, or org/name[@revision] on the hub")
    if at and not _REVISION.fullmatch(revision):
        raise CheckpointError("not a revision", where=ref, expected="a branch, tag or commit", got=repr(revision))
    return repository, revision or None


def is_needed(name: str) -> bool:
    """Whether a merge reads a file of this name, which may have a folder in front of it, in a repository."""
    return any(fnmatch(name, p) for p in NEEDED) and not any(fnmatch(name, p) for p in UNNEEDED)


def repository_of(ref: str) -> str | None:
    """The id on the hub in a reference, ``org/name`` of ``org/name[@revision]``; None for a folder."""
    repository = ref.partition("@")[0]
    return repository if _local(ref) is None and _local(repository) is None and _is_repository(repository) else None


def _is_repository(name: str) -> bool:
    return bool(_REPOSITORY.fullmatch(name)) and len(name) <= 96 and "--" not in name and ".." not in name


def _snapshot(folder: Path) -> Path:
    """A folder of a model; of a repository's folder in the hub's cache, its only snapshot.

    Raises:
        CheckpointError: it has several snapshots, or none.
    """
    snapshots = folder / "snapshots"
    if not (folder.name.startswith("models--") and snapshots.is_dir()) or (folder / "config.json").exists():
        return folder
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        "a repository in the hub's cache, with several snapshots" if found else "a repository without a snapshot",
        where=folder,
        expected="the folder of one snapshot" if found else "snapshots/ with a folder in it",
        got=some_of(path.name for path in found) or "none",
        hint=f"name one of them: {found[0]}" if found else f"name it {_name_on_hub(folder)} to download it",
    )


def _name_on_hub(folder: Path) -> str:
    return "/".join(folder.name.split("--")[1:])


def split_adapter(ref: str) -> tuple[str, str | None]:
    """``model+adapter`` -> the two; an existing folder whose own name contains a plus takes precedence. After an
    address, an adapter is a folder that exists."""
    if "+" not in ref or _local(ref) is not None:
        return ref, None
    if is_url(ref):  # a plus may be part of an address
        base, _, adapter = ref.rpartition("+")
        return (base, adapter) if _local(adapter) is not None else (ref, None)
    cuts = [i for i, character in enumerate(ref) if character == "+"][-100:]
    found = [(_local(ref[:i]) is not None) + (_local(ref[i + 1 :]) is not None) for i in cuts]
    at = cuts[found.index(max(found))]
    return ref[:at], ref[at + 1 :]


def _download(
    ref: str, repository: str, revision: str | None, cache_dir, offline: bool | None, patterns: tuple[str, ...]
) -> Path:
    from huggingface_hub import constants, snapshot_download

    cached_only = constants.HF_HUB_OFFLINE if offline is None else offline
    with hub_errors(ref, revision, cached_only):
        folder = snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=cached_only,
            allow_patterns=list(patterns),
            ignore_patterns=list(UNNEEDED),
        )
    return Path(folder)


@contextmanager
def hub_errors(ref: str, revision: str | None, cached_only: bool = False) -> Iterator[None]:
    """Turn errors of huggingface_hub into a CheckpointError.

    Args:
        ref: The reference, for messages.
        revision: Its revision.
        cached_only: Whether only the cache is used.

    Raises:
        CheckpointError: no such repository, revision, right or connection.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository = ref.partition("@")[0]
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except GatedRepoError as error:
        hint = f"accept its terms at {page}, then `hf auth login` or set HF_TOKEN"
        raise CheckpointError("the repository is gated", where=ref, hint=hint) from error
    except RepositoryNotFoundError as error:
        hint = _demo_hint(repository) or "check the spelling; for a private one `hf auth login` or set HF_TOKEN"
        raise CheckpointError("no such folder, and no such repository on the hub", where=ref, hint=hint) from error
    except RevisionNotFoundError as error:
        hint = f"its branches and tags: {page}/refs"
        raise CheckpointError("the repository has no such revision", where=ref, got=revision, hint=hint) from error
    except LocalEntryNotFoundError as error:
        if cached_only:
            hint = _demo_hint(repository) or "run once with a connection, or name a local folder"
            raise CheckpointError(
                "no such folder, and not in the hub's cache while offline", where=ref, hint=hint
            ) from error
        raise _unreachable(ref, error) from error
    except HFValidationError as error:
        raise CheckpointError("no such folder, and not a valid repository name", where=ref, got=str(error)) from error
    except HfHubHTTPError as error:
        raise _unreachable(ref, error) from error
    except OSError as error:  # a full disk, an unwritable cache
        raise CheckpointError("the hub's files could not be stored", where=ref, got=str(error)) from error
    except Exception as error:
        # The HTTP library's own errors; which library that is has changed from version to version.
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests", "hf_xet")):
            raise _unreachable(ref, error) from error
        raise


def _demo_hint(repository: str) -> str | None:
    """What to do about a missing model of the demo, which is in a folder that looks like the name of a repository."""
    if not repository.startswith("demo/"):
        return None
    return "deus-merge demo makes the models in demo/; on the hub the base is HuggingFaceTB/SmolLM2-135M-Instruct"


def _unreachable(ref: str, error: Exception) -> CheckpointError:
    cause = error.__cause__ or error
    return CheckpointError(
        "the hub cannot be reached",
        where=ref,
        got=f"{type(cause).__name__}: {cause}".splitlines()[0],
        hint=_demo_hint(ref)
        or "check the connection and HF_ENDPOINT; what is in the cache is read with HF_HUB_OFFLINE=1",
    )


def is_local(ref: str) -> bool:
    """Whether a reference names a file or folder of this machine."""
    return _local(ref) is not None


def _local(ref: str) -> Path | None:
    """The file or folder that a reference names; None when it does not exist."""
    try:
        path = Path(ref).expanduser()
        return path if ref and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a user that does not exist
        return None
