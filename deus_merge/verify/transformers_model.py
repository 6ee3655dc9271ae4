"""Checks an output in transformers: its tokenizer against the embeddings, and the model without its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.reader import TensorSource
from ..core.text import plural, some_of
from ..models.built import CannotBuild, build, reason, resolved_config
from ..models.config_json import Config, patched
from ..models.layer_kinds import BuiltStack, LayerOrigin, build_stack, misfits
from ..models.load_report import CannotReport, LoadReport, load_report
from ..models.modules import view_modules
from ..models.stacks import LAYER, is_of_vision_or_audio
from ..models.tokenizer.files import TOKENIZER_FILES
from ..models.tokenizer.tokenizer import tokens_digest
from ..models.view import ModelView, view_model
from ..report.manifest import Manifest
from ..report.manifest_parts import ManifestLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = tuple[bool | None, str]


@dataclass(frozen=True)
class _Stack:
    """A stack of the output: its module's name, None for the main one; its prefix, depth, and layers as recorded."""

    module: str | None
    prefix: str
    depth: int
    layers: Sequence[ManifestLayer]

    @property
    def title(self) -> str:
        return f"{self.module}: " if self.module else ""


#: keys of config.json that no layer depends on
_OF_NO_LAYER = re.compile(r"(torch_)?dtype|transformers_version|_name_or_path|vocab_size|.*_token_id|architectures")
_SHOWN = 3  # names in a detail
_EMBEDDINGS = re.compile(r"embed_tokens|embed_in|embeddings\.weight|(?:^|\.)embed\.weight|wte")


def tokenizer(checkpoint: TensorSource, view: ModelView, manifest: Manifest, folder: Path) -> tuple[bool | None, str]:
    """Check that every token has a row in the embeddings, and the id that was planned.

    Args:
        checkpoint, view, manifest: The output.
        folder: A folder with its files, weights apart.

    Returns:
        Whether it has (None: not known), and a detail.
    """
    if not any(name in manifest.files for name in TOKENIZER_FILES):
        return True, "the output has no tokenizer"
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None, "the folder has no tokenizer: tokenizer.save_pretrained(folder) puts it there"
    import transformers

    try:
        vocabulary = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    except (ImportError, ValueError) as error:  # it may need a package that is not installed
        return None, f"transformers cannot load it here: {' '.join(str(error).split())}"
    planned = manifest.vocabulary
    if planned and tokens_digest(vocabulary) != planned["digest"]:
        return (
            False,
            f"its {plural(len(vocabulary), 'token')} are not the {planned['tokens']} planned, or have other ids",
        )
    name = next((n for n in view.before if _EMBEDDINGS.search(n)), None)
    if name is None:
        return None, "no tensor is named like embeddings"
    rows, (last, token) = checkpoint.tensors[name].shape[0], max((i, token) for token, i in vocabulary.items())
    if last >= rows:
        return False, f"token {token!r} has number {last}, {name} has {plural(rows, 'row')}"
    return True, f"{plural(len(vocabulary), 'token')} for {plural(rows, 'row')} of {name}"


class BuiltModel:
    """An output and its base as transformers builds them, without weights.

    Args:
        checkpoint: The output.
        view: The output by layer and role.
        manifest: Its manifest.
        sources: The models of the manifest; for one that is not available, the reason.
        folder: A folder with the output's files, weights apart.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        view: ModelView,
        manifest: Manifest,
        sources: Sequence[TensorSource | str],
        folder: Path,
    ):
        self.checkpoint, self.view, self.manifest, self.sources = checkpoint, view, manifest, sources
        self.folder = folder

    @cached_property
    def model(self) -> PreTrainedModel:
        """The output, as a user would load it.

        Raises:
            CannotBuild: transformers cannot build it.
        """
        import transformers

        if self.checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
            resolved_config(self.checkpoint.config)  # says why
        try:
            config = transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:
            raise CannotBuild(f"transformers cannot read the config.json: {reason(error)}") from None
        return build(config)

    @cached_property
    def base(self) -> TensorSource | None:
        """The base; None where it is not available."""
        source = self.sources[self.manifest.donor]
        return None if isinstance(source, str) else source

    def base_reason(self) -> str | None:
        """Why transformers cannot build the base; None where it can, or where the base is not known."""
        config = self._config_of(self.manifest.donor)
        if config is None:
            return None
        try:
            build(resolved_config(config))
        except CannotBuild as error:
            return str(error)
        return None

    def loading(self, checksums: Mapping[str, str]) -> Result:
        """Check that the output loads in transformers at least as cleanly as its base, and that tied tensors are equal.

        Args:
            checksums: Of the output's tensors, by name.

        Returns:
            Whether it does (None: not known), and a detail.
        """
        try:
            model = self.model
        except CannotBuild as error:
            return self._cannot_build(error)
        if untied := _untied(model, self.checkpoint, checksums):
            return False, untied
        names = len(model.state_dict())
        try:
            report = load_report(model, _shapes(self.checkpoint))
            if report.clean:
                return True, f"{type(model).__name__}, {plural(names, 'name')} and shapes"
            if self.base is None:
                known = report.worse_than(LoadReport(), lambda name: ())
                unsure = "" if self.view.described else f"; {self.sources[self.manifest.donor]}, to compare it with"
                return (False if self.view.described else None), _list(known) + unsure
            of_base = load_report(build(resolved_config(self.base.config)), _shapes(self.base))
        except CannotReport as error:
            return None, str(error)
        except CannotBuild as error:
            return None, f"the base: {error}"
        if worse := report.worse_than(of_base, self._of_base):
            return False, _list(worse)
        return True, f"{type(model).__name__} loads as its base does: {report.counts}, as there"

    def layer_kinds(self) -> Result:
        """Check that every layer of every stack is built like a layer that it comes from.

        Returns:
            Whether it is (None: not known), and a detail.
        """
        try:
            model = self.model
        except CannotBuild as error:
            return self._cannot_build(error)
        kinds, unknown = 0, set()
        for stack in self._stacks():
            try:
                output = BuiltStack.of(model, stack.prefix, self.checkpoint.config)
                origins, missing = self._origins(stack, output)
            except CannotBuild as error:
                return None, str(error)
            if len(output.layers) != stack.depth:
                built = f"transformers builds {plural(len(output.layers), 'layer')} from config.json"
                return False, f"{stack.title}{built}, planned {stack.depth}"
            if wrong := misfits(output, origins):
                return False, stack.title + _list(map(str, wrong))
            kinds += len({layer.same_function() for layer in output.layers})
            unknown |= missing
        if unknown:
            return None, "; ".join(str(self.sources[number]) for number in sorted(unknown))
        depth = sum(stack.depth for stack in self._stacks())
        return True, f"{plural(depth, 'layer')} of {plural(kinds, 'kind')}, each like the one it comes from"

    def _stacks(self) -> list[_Stack]:
        """The stacks of the output: the main one, and those of other modules."""
        found = [_Stack(None, self.view.layer_prefix, self.manifest.num_layers, self.manifest.layers)]
        modules = self.manifest.modules or {}
        views = view_modules(self.checkpoint.config, tuple(self.checkpoint.tensors), self.view) if modules else {}
        for name, module in modules.items():
            found.append(_Stack(name, views[name].layer_prefix, module.num_layers, module.layers))
        return found

    def _origins(self, stack: _Stack, output: BuiltStack) -> tuple[list[list[LayerOrigin]], set[int]]:
        """For each layer of a stack those that it comes from, as far as they are known; and the sources that are not.

        Raises:
            CannotBuild: transformers cannot build a source.
        """
        numbers = {source.model: i for i, source in enumerate(self.manifest.sources)}
        built: dict[int, BuiltStack | None] = {}
        unknown = set()

        def layer_of(number: int, layer: int) -> list[LayerOrigin]:
            if number not in built:
                built[number] = self._source_stack(number, stack, output)
            source = built[number]
            if source is None or layer >= len(source.layers):
                unknown.add(number)
                return []
            return [LayerOrigin(source, layer, self.manifest.sources[number].model)]

        if not stack.layers:  # a recipe that leaves this stack as it is
            return [layer_of(self.manifest.donor, i) for i in range(stack.depth)], unknown
        origins = [[o for s in layer.sources for o in layer_of(numbers[s.model], s.layer)] for layer in stack.layers]
        return origins, unknown

    def _source_stack(self, number: int, stack: _Stack, output: BuiltStack) -> BuiltStack | None:
        """The built layers of a source; None where its config is not known."""
        config, source = self._config_of(number), self.sources[number]
        if config is None:
            return None
        if _same_layers(config, output.config):
            return output
        prefix = stack.prefix
        if not isinstance(source, str):
            view = view_model(config, tuple(source.tensors), source.where)
            if stack.module is not None:
                view = view_modules(config, tuple(source.tensors), view).get(stack.module, view)
            prefix = view.layer_prefix
        try:
            return build_stack(config, prefix)
        except CannotBuild as error:
            raise CannotBuild(f"{self.manifest.sources[number].model}: {error}") from None

    def _config_of(self, number: int) -> Config | None:
        """The config.json of a source; that of the base is also in the manifest."""
        source = self.sources[number]
        if not isinstance(source, str):
            return source.config
        if number == self.manifest.donor and self.manifest.donor_config is not None and not self.manifest.trained:
            return patched(self.checkpoint.config, self.manifest.donor_config)
        return None

    def _cannot_build(self, error: CannotBuild) -> Result:
        """A failure where the base can be built, else not known."""
        base = self.base_reason()
        return (None, f"neither it nor its base: {base}") if base else (False, str(error))

    def _of_base(self, name: str) -> Iterable[str] | None:
        """The names in the base that excuse a name in the output, by the origins of its layer; None: excused."""
        assert self.base is not None
        match = LAYER.fullmatch(name)
        if match is None:
            return [name]
        head, suffix, layer = match["prefix"], match["suffix"], int(match["index"])
        numbers = self._base_layers.get(suffix, set())
        if not self._in_main_stack(head):
            return [f"{head}.{number}.{suffix}" for number in {layer, *numbers}]
        depth, donor = self.manifest.num_layers, self.manifest.sources[self.manifest.donor].model
        if layer >= depth:  # a prediction layer, which transformers leaves out
            moved = layer - depth + self._base_depth
            return None if moved in numbers else [f"{head}.{moved}.{suffix}"]
        sources = self.manifest.layers[layer].sources if self.manifest.layers else ()
        own = [source.layer for source in sources if source.model == donor]
        others = [] if sources and len(own) == len(sources) else range(self._base_depth)
        return [f"{head}.{number}.{suffix}" for number in (*own, *others)]

    @cached_property
    def _base_layers(self) -> dict[str, set[int]]:
        """The names of the base's tensors under a layer's prefix -> the numbers of the layers that have them."""
        found: dict[str, set[int]] = {}
        for match in map(LAYER.fullmatch, self.base.tensors if self.base else ()):
            if match is not None:
                found.setdefault(match["suffix"], set()).add(int(match["index"]))
        return found

    @cached_property
    def _base_depth(self) -> int:
        assert self.base is not None
        return view_model(self.base.config, tuple(self.base.tensors), self.base.where).num_layers

    def _in_main_stack(self, prefix: str) -> bool:
        main = self.view.layer_prefix.rpartition(".{layer}")[0]
        sides = {"encoder", "decoder"}
        same_side = sides & set(prefix.split(".")) == sides & set(main.split("."))
        same_end = prefix.rpartition(".")[2] == main.rpartition(".")[2]
        return same_end and same_side and is_of_vision_or_audio(prefix) == is_of_vision_or_audio(main)


def build_language_model(checkpoint: TensorSource) -> PreTrainedModel:
    """The model on the meta device, with a language model's head where it has one.

    Raises:
        CannotBuild: transformers cannot build it.
    """
    return build(resolved_config(checkpoint.config), language_model=True)


def _untied(model: PreTrainedModel, checkpoint: TensorSource, checksums: Mapping[str, str]) -> str | None:
    """What is wrong with tied tensors: both are stored, and differ."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return None
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(m): f"{name}.weight" for name, m in model.named_modules()}
    head, embeddings = names.get(id(head), ""), names.get(id(embeddings), "")
    if head not in checkpoint.tensors or checksums.get(head) == checksums.get(embeddings):
        return None
    return f"config.json ties the embeddings, but {head} is not equal to {embeddings}"


def _shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in source.tensors.items()}


def _same_layers(one: Config, other: Config) -> bool:
    """Whether two configs are equal but for keys that no layer depends on."""
    return all(one.get(k) == other.get(k) for k in one.keys() | other.keys() if not _OF_NO_LAYER.fullmatch(k))


def _list(problems: Iterable[str]) -> str:
    problems = list(problems)
    count = f"{len(problems)} differ, first " if len(problems) > 1 else ""
    return count + some_of(problems, _SHOWN)
