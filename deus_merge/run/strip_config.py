"""The config.json of the base, from that of an output whose new layers are removed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from ..checkpoint import Checkpoint
from ..checkpoint.quantized import quantization, with_quantization
from ..core.tensors import StoredTensor
from ..core.units import dtype_name
from ..models.config_json import patched
from ..models.config_rules import LayerEntries, deeper_config
from ..models.facts.quantization import SECTIONS
from ..models.layer_facts import expand
from ..models.view import ModelView
from ..report.manifest import Manifest


def base_config(
    checkpoint: Checkpoint,
    view: ModelView,
    layers: Sequence[int],
    manifest: Manifest,
    sources: Mapping[str, StoredTensor],
) -> dict:
    """The checkpoint's config.json with the base's depth and lists, without the keys that the growth added.

    Args:
        checkpoint, view: The output.
        layers: The numbers of its layers that are the base's, in the base's order.
        manifest: The output's record.
        sources: The base's tensors, by name.
    """
    patch = manifest.donor_config or {}
    origins = [LayerEntries(checkpoint.config, layer, str(checkpoint.folder), view.layers_path) for layer in layers]
    config = deeper_config(checkpoint.config, view.layers_path, origins, None)
    kept = copy.deepcopy(config)
    _drop_added(config, patch)
    _put_back(config, patch, checkpoint.config)
    if expand(config, view.layers_path, view.model_type) != expand(kept, view.layers_path, view.model_type):
        config = kept  # what the growth took the place of would now say something else
    if quantization(checkpoint.config) is None:  # nor does it become quantised by losing layers
        config = with_quantization(config, None)
    for key in SECTIONS:  # the same layers under the same numbers
        if key in config and isinstance(patch.get(key), Mapping):
            config[key] = patched(checkpoint.config[key], patch[key])
    stored = {dtype_name(info.dtype) for info in sources.values()}
    for key in ("dtype", "torch_dtype"):
        before = patch.get(key)
        if key in config and before is not None and {before} == stored:  # not when the tensors were cast
            config[key] = before
    return config


def with_nulls(config: Mapping, base: Mapping) -> dict:
    """A config with the nulls of another one, which a merge patch cannot express, where the rest is equal."""
    nulls = {key for key, value in base.items() if value is None and key not in config}
    inner = {
        key: with_nulls(value, base[key])
        for key, value in config.items()
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    keys = [key for key in base if key in config or key in nulls]
    keys += [key for key in config if key not in base]
    return {key: None if key in nulls else inner.get(key, config.get(key)) for key in keys}


def _drop_added(config: dict, patch: Mapping) -> None:
    """Remove the keys that a merge patch removes, and leave all others as they are."""
    for key, value in patch.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _drop_added(config[key], value)


def _put_back(config: dict, patch: Mapping, grown: Mapping) -> None:
    """Add the keys that the growth removed."""
    for key, value in patch.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict) and isinstance(grown.get(key), Mapping):
            _put_back(config[key], value, grown[key])
        elif value is not None and key not in grown:
            config.setdefault(key, copy.deepcopy(value))
