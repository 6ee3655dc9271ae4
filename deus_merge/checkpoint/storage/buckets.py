"""Buckets: S3 and what speaks like it, Google Cloud Storage, Azure. Credentials and endpoints come from the environment
variables that obstore reads."""

from __future__ import annotations

from typing import Literal
from urllib.parse import quote

from ...core.errors import CheckpointError
from ...core.urls import public_url
from ..tensor_source import TensorSource
from ._remote import open_remote
from ._sink import Sink
from ._transfer import Remote, check_installed
from .base import LoadOptions

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL (AWS_ALLOW_HTTP=true for http://);"
    " AWS_SKIP_SIGNATURE=true for public data",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT, GOOGLE_BASE_URL (GOOGLE_ALLOW_HTTP=true for"
    " http://); GOOGLE_SKIP_SIGNATURE=true for public data",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_KEY or AZURE_CLIENT_ID ...,"
    " AZURE_STORAGE_ENDPOINT (AZURE_ALLOW_HTTP=true for http://); AZURE_SKIP_SIGNATURE=true for public data",
}


class Buckets:
    """The storage ``buckets``."""

    summary = "a folder in a bucket of S3, Google Cloud Storage or Azure, read by range; an output can be one"
    example = "s3://bucket/model, gs://bucket/model or az://container/model"

    def takes(self, ref: str, options: LoadOptions) -> bool:
        return _scheme(ref) in _CREDENTIALS

    def open(self, ref: str, options: LoadOptions) -> TensorSource:
        remote = Remote(*self._place(ref), patience=options.patience, credentials=_hint(ref))
        return open_remote(remote, options.spool, remote.list())

    def sink(self, ref: str) -> Sink:
        return Sink(*self._place(ref), credentials=_hint(ref))

    def _place(self, ref: str) -> tuple[str, str, Literal["bucket"]]:
        """Address, name and kind of a folder, which has one name: ``%20`` in it is no space, and ``..`` is refused.

        Raises:
            CheckpointError: not an address of a bucket; or obstore is missing.
        """
        name = public_url(ref).rstrip("/")
        if name != ref.rstrip("/"):
            raise CheckpointError(
                "an address of a bucket has no user, password or query",
                where=name,
                expected=self.example,
                hint=f"credentials are read from the environment: {_CREDENTIALS[_scheme(ref)]}",
            )
        _check_place(name)
        check_installed(ref)
        scheme, _, place = name.partition("://")
        return f"{scheme}://{quote(place)}", name, "bucket"


def _hint(ref: str) -> str:
    return f"set {_CREDENTIALS[_scheme(ref)]}"


def _scheme(ref: str) -> str:
    return ref.partition("://")[0] if "://" in ref else ""


def _check_place(name: str) -> None:
    """Check that bucket and folders of an address have names.

    Raises:
        CheckpointError: one has none.
    """
    if any(part in ("", ".", "..") for part in name.partition("://")[2].split("/")):
        raise CheckpointError("an address of a bucket has no empty parts, '.' or '..'", where=name)


STORAGE = Buckets()
