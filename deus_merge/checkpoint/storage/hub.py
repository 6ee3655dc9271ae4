"""Models of the hub read by range (``--stream``): nothing is copied to this machine."""

from __future__ import annotations

from ...core.errors import CheckpointError
from ...core.urls import is_url
from ..hub import hub_errors, is_local, split_revision
from ..tensor_source import TensorSource
from ._remote import open_remote
from ._transfer import Remote, check_installed
from .base import LoadOptions


class Hub:
    """The storage ``hub``."""

    summary = "a model of the hub, read by range (--stream)"
    example = "org/name[@revision]"

    def takes(self, ref: str, options: LoadOptions) -> bool:
        return options.stream and not is_url(ref) and not is_local(ref)

    def open(self, ref: str, options: LoadOptions) -> TensorSource:
        from huggingface_hub import HfApi, constants, get_token

        repository, revision = split_revision(ref)
        check_installed(ref)
        if constants.HF_HUB_OFFLINE:
            hint = "unset HF_HUB_OFFLINE, or leave out --stream for what is in the cache"
            raise CheckpointError("nothing can be streamed while offline", where=ref, hint=hint)
        with hub_errors(ref, revision):
            info = HfApi(endpoint=constants.ENDPOINT).model_info(repository, revision=revision)
        if info.sha is None:
            raise CheckpointError("the hub names no commit", where=ref)
        url = f"{constants.ENDPOINT}/{repository}/resolve/{info.sha}"
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        name = f"{constants.ENDPOINT}/{repository}"
        hint = "accept the terms of a gated model; `hf auth login` or HF_TOKEN for a private one"
        remote = Remote(url, name, "http", headers, info.sha, options.patience, hint)
        return open_remote(remote, options.spool, [file.rfilename for file in info.siblings or ()])

    def sink(self, ref: str) -> None:
        return None


STORAGE = Hub()
