"""Addresses are shown without what may be a secret, in whatever text and form they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from deus_merge.core.errors import CheckpointError
from deus_merge.core.urls import is_url, public_url, redacted, split_url, url_path
from deus_merge.models.reference import ModelRef

SECRET = "hunter2"
CASES = {
    f"https://me:{SECRET}@host/a/b": "https://host/a/b",
    f"https://me:{SECRET}@host:8080/a?x=1": "https://host:8080/a",
    f"https://host/a?sig={SECRET}&x=1": "https://host/a",
    f"https://host/a#{SECRET}": "https://host/a",
    f"https://me:x/{SECRET}@host/a": "https://host/a",
    f"https://me:{SECRET}#1@host/a": "https://host/a",
    f"https://me:{SECRET}?@host/a@v1": "https://host/a@v1",
    f"https://{SECRET}@host/a": "https://host/a",
    f"s3://key:{SECRET}@bucket/a": "s3://bucket/a",
    "https://host:8080/org/name@v1": "https://host:8080/org/name@v1",
    "s3://bucket/a+b/c": "s3://bucket/a+b/c",
    "http://[::1]:80/a": "http://[::1]:80/a",
}


@pytest.mark.parametrize(("url", "public"), CASES.items())
def test_what_is_shown(url, public):
    assert is_url(url) and public_url(url) == public == public_url(public)
    assert redacted(url) == public
    assert redacted(f"see '{url}' and ({url})").startswith(f"see '{public}' and ({public}")
    assert SECRET not in redacted(f"{url}/config.json: it failed, {url}")
    assert SECRET not in str(CheckpointError(url, where=Path(url), got=url, expected=url, hint=url))
    assert SECRET not in f"{ModelRef.of(url)} {ModelRef.of(url)!r}" and ModelRef.of(url).text == public
    assert ModelRef.of(url).address == (None if url == public else url)
    assert redacted(str(url_path(url, "config.json"))) == f"{public}/config.json"


def test_lists_in_yaml_stay():
    text = f"models: [{{model: https://host/a?sig={SECRET}}}, https://me:{SECRET}@host/b], s3://c/d)."
    assert redacted(text) == "models: [{model: https://host/a}, https://host/b], s3://c/d)."


def test_addresses_that_follow_each_other():
    for between in ("=", "+", ",", ";"):
        text = f"https://me:{SECRET}@host/a{between}https://me:{SECRET}@host/b?sig={SECRET}"
        assert SECRET not in redacted(text) and "host/b" in redacted(text), redacted(text)


def test_parts():
    assert split_url("https://a:b%40c@host/x?y=1#z") == ("https", "a:b%40c", "host/x", "y=1")


@pytest.mark.parametrize("text", ["org/name", "./a", "C:/models/a", "/a:/b", "a: /b", "12:/34"])
def test_other_text_stays(text):
    assert not is_url(text) and redacted(text) == text
