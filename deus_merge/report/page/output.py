"""``report``: the page about one output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..block_times import bound, in_words, percentages, total_seconds
from ..manifest import Manifest
from ..manifest_parts import ManifestLayer
from .alignment import pictures, tables
from .figures import is_number, plain
from .frame import render
from .layer_map import color, layer_map, layer_table, short_name
from .next_steps import next_steps

REPORT = "report.html"
#: the folders of an absolute path in a sentence
_FOLDERS = re.compile(r"(?<![\w./~-])/(?:[^\s/:;,'\"]+/)+")

#: of each kind of work the CSS class of its colour, and what to do where it takes most of a run
_TIMES = {
    "read": ("derive", "sources that are nearer, or a faster way to them, would shorten it."),
    "computed": ("compute", "more workers, or a GPU, would shorten it."),
    "wrote": ("cast", "a faster disk would shorten it."),
    "waited": ("other", "a faster disk for the sources, or fewer programs at the same time, would shorten it."),
}


def render_page(
    manifest: Manifest, recipe: str, verification: Mapping, *, folder: str, parameters: tuple[int, int] | None = None
) -> str:
    """The page about one output. The same arguments give the same page.

    Args:
        manifest: The output's manifest.
        recipe: The text of ``deus_merge.yml``.
        verification: The output of `verify.Verification.describe`.
        folder: The name of the output's folder.
        parameters: The number of the output's parameters, and of those in new layers; None where they are not known.

    Returns:
        HTML.
    """
    depths = _depths(manifest)
    sources = [
        {
            "model": s.model,
            "digest": s.contents or s.fingerprint,
            "name": short_name(s.model),
            "layers": depths[s.model],
        }
        for s in manifest.sources
    ]
    checks = [{**check, "detail": _without_folders(check["detail"])} for check in verification["checks"]]
    full = any(check["name"] == "transformers" for check in checks)
    sizes = [] if manifest.trained else [file.bytes for file in manifest.weights.values()]
    stacks = [_stack("Layers", manifest.layers, depths)]
    stacks += [
        _stack(f"Layers of {name}", module.layers, _used(module.layers))
        for name, module in (manifest.modules or {}).items()
    ]
    values = {
        "manifest": manifest,
        "title": _title(manifest, sources),
        "recipe": plain(recipe),
        "checks": checks,
        "counts": {mark: sum(c["passed"] is mark for c in checks) for mark in (True, False, None)},
        "full": full,
        "sources": sources,
        "base": sources[manifest.donor],
        "size": sum(sizes) if sizes else None,
        "parameters": parameters,
        "stacks": stacks,
        "tables": tables(manifest.layers),
        "pictures": pictures(manifest.layers),
        "seconds": manifest.options.get("seconds"),
        "times": _times(manifest),
        "date": manifest.options.get("date"),
        "steps": list(next_steps(manifest, folder, checked=full)),
    }
    return render("output.html", values)


def _title(manifest: Manifest, sources: list[dict[str, Any]]) -> str:
    """The output in a few words."""
    base = sources[manifest.donor]
    if manifest.new_layers or base["layers"] != manifest.num_layers:
        return f"{base['name']}: {base['layers']} → {manifest.num_layers} layers"
    names = dict.fromkeys(short_name(s.model) for layer in manifest.layers for s in layer.sources)
    return f"{' + '.join(names) or base['name']}: {manifest.num_layers} layers"


def _stack(title: str, layers: tuple[ManifestLayer, ...], depths: Mapping[str, int]) -> dict[str, Any]:
    return {
        "title": title,
        "map": layer_map(layers, depths),
        "legend": {layer.actions: color(layer) for layer in layers},
        "rows": layer_table(layers),
    }


def _times(manifest: Manifest) -> dict[str, Any] | None:
    """What the blocks took their time for; None where the manifest does not say it."""
    blocks = [b for b in manifest.blocks if all(is_number(b.seconds[kind]) for kind in _TIMES)]
    total = total_seconds(blocks)
    shares = percentages(total)
    if not shares:
        return None
    parts = [
        {"kind": kind, "color": color, "width": f"{share:.2f}", "share": f"{share:.0f}", "seconds": total[kind]}
        for (kind, share), (color, _) in zip(shares.items(), _TIMES.values(), strict=True)
    ]
    longest = max(shares, key=lambda kind: shares[kind])
    return {
        "parts": parts, "bound": bound(shares), "words": in_words(total), "advice": _TIMES[longest][1], "blocks": blocks
    }  # fmt: skip


def _depths(manifest: Manifest) -> dict[str, int]:
    """The number of layers of each source; where the manifest does not say it, of those that were used."""
    used = _used(manifest.layers)
    return {s.model: used.get(s.model, 0) if s.layers is None else s.layers for s in manifest.sources}


def _used(layers: tuple[ManifestLayer, ...]) -> dict[str, int]:
    """The number of layers that each source has at least."""
    used: dict[str, int] = {}
    for source in (s for layer in layers for s in layer.sources):
        used[source.model] = max(used.get(source.model, 0), source.layer + 1)
    return used


def _without_folders(text: str) -> str:
    """Text without the folders of a machine: a page is shown to others."""
    return _FOLDERS.sub("", text)
