"""The checks of a finished output, one method each. Later checks use files that earlier ones opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from ..checkpoint.dequantized import dequantized, float_shapes
from ..checkpoint.header import parse_json
from ..checkpoint.index import INDEX
from ..checkpoint.quantized import is_cache_scale, quantization
from ..checkpoint.reader import Checkpoint, TensorSource
from ..core.tensors import Action, StoredTensor
from ..core.text import plural, some_of
from ..core.units import dtype_name, promoted
from ..core.urls import address_of
from ..models.config_json import dtype_named, section
from ..models.config_rules import check_config
from ..models.layer_facts import expand, plain
from ..models.modules import view_modules
from ..models.view import ModelView, view_model
from ..report.manifest import MANIFEST, USER_FILES, Manifest
from . import logits
from . import transformers_model as model
from .files import output_files
from .sources import changed_source, reopened
from .weights import ALGORITHM, ZEROS, Received, TensorCheck, TensorResult, examine

#: Patterns of files that are loaded from a folder: only files that the run wrote may match them.
_LOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "vocab.txt", "merges.txt")
_SHOWN = 3  # names in a detail

CheckResult = tuple[bool | None, str] | tuple[bool | None, str, Mapping[str, object]]


class Skipped(Exception):
    """A check that cannot be done; the message is the reason."""


class Output:
    """A folder with the content of its manifest.

    Args:
        folder: The output.
        manifest: Its manifest.
        sources: The models it was made from, if the run is not finished: checksums are then computed, not compared.
        received: Checksums of what was copied from other machines, by the name of the tensor.
        quick: Whether the pass over the weights does not look for NaN and infinity, and models on other machines are
            not opened again.
        named: The ``model`` of the sources whose place the user has named: they must be there.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        sources: Sequence[TensorSource] | None,
        received: Mapping[str, str],
        *,
        quick: bool,
        named: Collection[str] = (),
    ):
        self.folder, self.manifest, self.finite = folder, manifest, not quick
        self._files = output_files(folder)
        self.fresh = sources is not None
        self._received = received
        self._sources = reopened(manifest, quick, named) if sources is None else list(sources)
        self._checkpoint: Checkpoint | None = None
        self._view: ModelView | None = None
        self._model: TensorSource | None = None  # its weights as a model in floating point has them
        self._results: Mapping[str, TensorResult] | None = None

    # files -------------------------------------------------------------------------------------------------------

    def other_files(self) -> CheckResult:
        """All files but the weights are as they were written, and a loader finds no others."""
        self._only_before_training()
        digests, wrong = self.manifest.files, []
        for name, digest in digests.items():
            if name in USER_FILES:
                continue
            content = self._files.read(name)
            if content is None:
                wrong.append(f"{name} is missing")
            elif hashlib.sha256(content).hexdigest() != digest:
                wrong.append(f"{name} is not as it was written")
        if self.manifest.format > 1:  # format 1 does not name all files
            known = {*digests, *self.manifest.weights, MANIFEST}
            strange = (name for name in self._files.names() if name not in known)
            wrong += [f"{n} was not written by the run" for n in strange if any(fnmatch(n, p) for p in _LOADED)]
        return (False, some_of(wrong, _SHOWN)) if wrong else (True, f"{len(digests.keys() - USER_FILES)} as written")

    def headers(self) -> CheckResult:
        """The index and every header are valid, as they were written, and agree with each other."""
        checkpoint = self._checkpoint = self._files.open()
        planned, wrong = {} if self.manifest.trained else self.manifest.weights, []
        names = {header.file.relative_to(checkpoint.folder).as_posix(): header for header in checkpoint.headers}
        for name, header in names.items():
            file = planned.get(name)
            if file and (header.size, header.digest.hex()) != (file.bytes, file.header_sha256):
                wrong.append(f"{name} does not have the header that was written")
        wrong += [f"{name} does not belong to the checkpoint any more" for name in planned if name not in names]
        if index := self._files.read(INDEX):
            content = parse_json(index, self.folder / INDEX, "index")
            unnamed = sorted(checkpoint.tensors.keys() - content["weight_map"].keys())
            if unnamed:
                wrong.append(f"{INDEX} does not name {some_of(unnamed, _SHOWN)}")
            size = sum(t.nbytes for t in checkpoint.tensors.values())
            if content.get("metadata", {}).get("total_size") != size:
                wrong.append(f"{INDEX}: total_size is not {size}")
        files = plural(len(names), "file")
        found = f"{files}, {plural(len(checkpoint.tensors), 'tensor')}, no hole and no overlap"
        return (False, some_of(wrong, _SHOWN)) if wrong else (True, found)

    @property
    def checkpoint(self) -> Checkpoint:
        if self._checkpoint is None:
            raise Skipped("the weights cannot be opened")
        return self._checkpoint

    @property
    def view(self) -> ModelView:
        if self._view is None:
            raise Skipped("config and tensors do not make a model")
        return self._view

    @property
    def model(self) -> TensorSource:
        if self._model is None:
            raise Skipped("config and tensors do not make a model")
        return self._model

    # names and config --------------------------------------------------------------------------------------------

    def tensors(self) -> CheckResult:
        """Names, dtypes and shapes as planned."""
        planned, found, trained = self.manifest.tensors, self.checkpoint.tensors, self.manifest.trained
        tied = trained and self.checkpoint.config.get("tie_word_embeddings") is True
        dropped = {"lm_head.weight"} if tied else set()  # transformers saves a tied head once, as the embeddings
        plain = {t.weight for n, t in planned.items() if trained and t.weight in found and n not in found}
        dropped |= {n for n, t in planned.items() if t.weight in plain}  # saved in floating point
        dropped |= {n for n in planned if plain and is_cache_scale(n)}
        wrong = [f"{name} is missing" for name in planned if name not in found and name not in dropped]
        known = planned.keys() | plain
        wrong += [f"{name} in {found[name].file.name} was not planned" for name in found if name not in known]
        other_dtypes = set()
        for name in (name for name in found if name in planned):
            stored, plan = found[name], planned[name]
            if plan.dtype is None or plan.shape is None:  # format 1
                continue
            if (stored.dtype, stored.shape) != (plan.dtype, plan.shape) and not trained:
                is_now, planned_as = f"{stored.dtype} {list(stored.shape)}", f"{plan.dtype} {list(plan.shape)}"
                wrong.append(f"{name} in {stored.file.name} is {is_now}, planned {planned_as}")
            if stored.dtype != plan.dtype:
                other_dtypes.add(stored.dtype)
        if wrong:
            return False, some_of(wrong, _SHOWN)
        dtypes = f"shapes; now {', '.join(map(dtype_name, sorted(other_dtypes)))}" if other_dtypes else "dtypes, shapes"
        return True, f"{len(found)} as planned: names, {dtypes}"

    def config(self) -> CheckResult:
        """config.json, the tensors and the plan agree on family, depth, sizes and every list with an entry a layer."""
        checkpoint, manifest = dequantized(self.checkpoint), self.manifest
        view = view_model(checkpoint.config, tuple(checkpoint.tensors), self.folder)
        check_config(checkpoint.config, view, float_shapes(checkpoint), self.folder)
        self._view, self._model = view, checkpoint
        if view.num_layers != manifest.num_layers:
            return False, f"config.json: {plural(view.num_layers, 'layer')}, planned {manifest.num_layers}"
        modules = view_modules(checkpoint.config, tuple(checkpoint.tensors), view)
        for name, planned in (manifest.modules or {}).items():
            got = modules[name].num_layers if name in modules else 0
            if got != planned.num_layers:
                return False, f"config.json: {name} has {plural(got, 'layer')}, planned {planned.num_layers}"
        settings = section(checkpoint.config, view.layers_path)
        for key in manifest.layer_lists:
            entries = settings.get(key)
            if not isinstance(entries, list) or len(entries) != view.num_layers:
                return False, f"config.json: {key} must be a list of {view.num_layers} entries, one for each layer"
        if wrong := self._wrong_fact(view):
            return False, wrong
        dtype = dtype_named(checkpoint.config)
        if manifest.format > 1 and dtype != manifest.dtype and not manifest.trained:
            return False, f"config.json: dtype {dtype}, planned {manifest.dtype}"
        lists = f", lists: {', '.join(manifest.layer_lists)}" if manifest.layer_lists else ""
        return True, f"{plural(view.num_layers, 'layer')}, {len(manifest.new_layers)} new{lists}"

    def _wrong_fact(self, view: ModelView) -> str | None:
        """What config.json says otherwise of a layer than planned; None where it does not. A trainer may have saved the
        config in other words: then only what it still says is compared."""
        said = plain(expand(self.checkpoint.config, view.layers_path, view.model_type))
        for name, planned in (self.manifest.layer_facts or {}).items():
            if name not in said and not self.manifest.trained:
                return f"config.json: {name} is missing"
            for layer, (new, old) in enumerate(zip(said.get(name, planned), planned, strict=False)):
                if new != old:
                    return f"config.json: {name} of layer {layer} is {new}, planned {old}"
        return None

    # bytes -------------------------------------------------------------------------------------------------------

    def checksums(self) -> CheckResult:
        """Read the weights once: for this check, and for the results that later checks report."""
        checks = []
        for name, tensor in self.checkpoint.tensors.items():
            action = self._action(name)
            copied: StoredTensor | Received | None = self._stored_source(tensor) if action is Action.COPY else None
            if isinstance(copied, StoredTensor) and copied.remote is not None and name in self._received:
                copied = Received(self._received[name])
            checks.append(TensorCheck(tensor, ZEROS if action is Action.ZEROS else copied))
        results = self._results = examine(checks, finite=self.finite)
        if self.fresh:
            return True, f"{plural(len(results), 'tensor')}, computed now"
        self._only_before_training()
        if all(tensor.xxh3_128 is None for tensor in self.manifest.tensors.values()):
            raise Skipped("the run computed none (it had --no-verify, or an older version wrote it)")
        wrong = [name for name in results if not self._as_written(name)]
        if wrong:
            return False, self._places(wrong, "is not as it was written")
        return True, f"{plural(len(results), 'tensor')} as written ({ALGORITHM})"

    def _as_written(self, name: str) -> bool:
        planned = self.manifest.tensors.get(name)
        return planned is not None and self.results[name].checksum == planned.xxh3_128

    @property
    def results(self) -> Mapping[str, TensorResult]:
        if self._results is None:
            raise Skipped("the weights cannot be read")
        return self._results

    @property
    def computed(self) -> dict[str, str]:
        """Checksums by name; empty where the weights could not be read."""
        return {name: result.checksum for name, result in (self._results or {}).items()}

    def zeroed(self) -> CheckResult:
        """Tensors that were written as zeros are zero."""
        self._only_before_training()
        names = self._names(Action.ZEROS)
        wrong = [name for name in names if not self.results[name].equal]
        return (False, self._places(wrong, "is not zero")) if wrong else (True, f"{len(names)} zero")

    def copied(self) -> CheckResult:
        """Copied tensors are equal to their sources. Where one cannot be compared, the check is skipped."""
        if self.manifest.base_trained:
            raise Skipped("the base was trained, too")
        names, derived = self._names(Action.COPY), self._names(Action.DERIVE)
        plain = self._saved_as_floats()
        names = [name for name in names if name not in plain]
        derived += [name for name in self._names(Action.CAST) if self.manifest.tensors[name].derived]
        derived = [name for name in derived if not self._only_dequantized(name)]
        compared = [name for name in names if self._source_of(name) is not None]
        wrong = [name for name in compared if not self.results[name].equal]
        if wrong:
            return False, self._places(wrong, "differs from its source") + self._hint(wrong)
        missing = sorted({self._source_index(name) for name in names if self._source_of(name) is None})
        reasons = [str(self._sources[index]) for index in missing]
        if derived:
            were = "tensor was" if len(derived) == 1 else "tensors were"
            reasons.append(
                f"{len(derived)} {were} derived (adapter, tokenizer, document), so no source has their bytes"
            )
        if plain:
            weights = "weight was" if len(plain) == 1 else "weights were"
            reasons.append(f"{len(plain)} quantised {weights} saved in floating point")
        if not names and not derived and not plain:
            if changed := None if self.fresh else changed_source(self._sources, self.manifest):
                raise Skipped(f"no tensor was copied; source {changed} has changed since")
            return True, "no tensor was copied"
        sources = {name: self._stored_source(self.checkpoint.tensors[name]) for name in compared}
        widened = sum(source is not None and source.dtype != self._dtype_of(name) for name, source in sources.items())
        wider = f"{widened} of them in a wider dtype" if widened else "byte for byte"
        equal = f"{len(compared)} equal to their sources, {wider}" if compared else "none compared"
        return (None, f"{equal}; {some_of(reasons, _SHOWN)}") if reasons else (True, equal)

    def _saved_as_floats(self) -> list[str]:
        """Quantised weights of the frozen base that a trainer saved in floating point."""
        if not self.manifest.trained:
            return []
        planned, found = self.manifest.tensors, self.checkpoint.tensors
        return [
            name
            for name, codes in self.manifest.model_tensors.items()
            if codes.weight and name in found and name not in self.manifest.grown_names
            if name not in planned or found[name].dtype != planned[name].dtype
        ]

    def _only_dequantized(self, name: str) -> bool:
        """Whether a tensor has the values of quantised weights: computed, and rounded, like those of a merge."""
        sources = [self._sources[index] for index in self.manifest.tensors[name].derived]
        return all(isinstance(s, Checkpoint) and quantization(s.config) is not None for s in sources)

    def _hint(self, wrong: Sequence[str]) -> str:
        """The likely cause of tensors that differ from their sources."""
        name = wrong[0]
        source, planned = self._source_of(name), self.manifest.tensors[name]
        original = source.tensors.get(planned.tensor or "") if source else None
        if original and original.dtype != self._dtype_of(name) and self.manifest.trained:
            now, then = dtype_name(self._dtype_of(name)), dtype_name(original.dtype)
            return f" (it is {now}, its source {then}: save the model in a dtype that holds its base)"
        if all(map(self._as_written, wrong)):
            return " (the checksums fit, so the source may have changed)"
        return ""

    def finite_values(self) -> CheckResult:
        """No tensor holds NaN or infinity."""
        wrong = [name for name, result in self.results.items() if result.finite is False]
        checked = sum(result.finite is not None for result in self.results.values())
        return (
            (False, self._places(wrong, "holds NaN or infinity")) if wrong else (True, f"{plural(checked, 'tensor')}")
        )

    def _action(self, name: str) -> Action | None:
        planned = self.manifest.tensors.get(name)
        return planned.action if planned else None

    def _names(self, action: Action) -> list[str]:
        """Tensors that came about by an action; after training, only those of the frozen base."""
        trainable = self.manifest.grown_names if self.manifest.trained else frozenset()
        return [n for n in self.checkpoint.tensors if self._action(n) is action and n not in trainable]

    def _only_before_training(self) -> None:
        """Skip a check after training, when only the frozen base can be compared: the trainer wrote new files."""
        if self.manifest.trained:
            raise Skipped("the model was trained")

    def _source_index(self, name: str) -> int:
        """The index of the source of a copied tensor."""
        index = self.manifest.tensors[name].model
        assert index is not None  # the manifest is checked when it is read
        return index

    def _source_of(self, name: str) -> TensorSource | None:
        """The source of a copied tensor; None where it is not available."""
        source = self._sources[self._source_index(name)]
        return None if isinstance(source, str) else source

    def _stored_source(self, ours: StoredTensor) -> StoredTensor | None:
        """The stored tensor that a copy must be equal to; None where it is not available, or cannot be equal."""
        source, name = self._source_of(ours.name), self.manifest.tensors[ours.name].tensor
        theirs = source.tensors.get(name) if source and name is not None else None
        if not theirs or theirs.shape != ours.shape:
            return None
        widened = self.manifest.trained and promoted([ours.dtype, theirs.dtype]) == ours.dtype
        return theirs if theirs.dtype == ours.dtype or widened else None

    def _dtype_of(self, name: str) -> str:
        return self.checkpoint.tensors[name].dtype

    def _places(self, names: Sequence[str], problem: str) -> str:
        return some_of([f"{name} in {self.checkpoint.tensors[name].file.name} {problem}" for name in names], _SHOWN)

    # transformers ------------------------------------------------------------------------------------------------

    def tokenizer(self) -> CheckResult:
        """Every token has a row in the embeddings, and the id that was planned."""
        return model.tokenizer(self.model, self.view, self.manifest, self._files.loaded)

    def transformers(self) -> CheckResult:
        """transformers loads the output as cleanly as its base."""
        return self._built.loading(self.computed)

    def layer_kinds(self) -> CheckResult:
        """transformers builds every layer like the one that it comes from."""
        return self._built.layer_kinds()

    @cached_property
    def _built(self) -> model.BuiltModel:
        sources = [source if isinstance(source, str) else dequantized(source) for source in self._sources]
        return model.BuiltModel(self.model, self.view, self.manifest, sources, self._files.loaded)

    def logits(self, text: str) -> CheckResult:
        """Base and output give finite logits over a text: equal ones where that was planned."""
        base = self._sources[self.manifest.donor]
        if address_of(self.folder):
            raise Skipped("the output is in a bucket: transformers loads folders of this machine, so download it first")
        if isinstance(base, str):
            raise Skipped(base)
        if isinstance(base, Checkpoint) and not base.folders:
            raise Skipped("the base is on another machine: transformers loads folders of this one")
        if not isinstance(base, Checkpoint):
            raise Skipped("the base is derived when it is read: it has no folder to load")
        equal = self.manifest.function_preserving and not self.manifest.trained
        return logits.compare(base.folder, self.folder, text, equal=equal)


#: name, check, and whether it needs transformers or a look at every value
CHECKS: tuple[tuple[str, Callable[[Output], CheckResult], bool], ...] = (
    ("other files", Output.other_files, False),
    ("files and headers", Output.headers, False),
    ("tensors against the plan", Output.tensors, False),
    ("layers and config", Output.config, False),
    ("checksums", Output.checksums, False),
    ("zeroed tensors", Output.zeroed, False),
    ("copied tensors", Output.copied, False),
    ("finite values", Output.finite_values, True),
    ("tokenizer", Output.tokenizer, True),
    ("transformers", Output.transformers, True),
    ("layer kinds", Output.layer_kinds, True),
)
