"""Checks an output in transformers: its tokenizer against the embeddings, and the model without its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ..checkpoint.reader import Checkpoint, TensorSource
from ..core.text import some_of
from ..models.built import CannotBuild, build, describe_stack, main_stack, reason, resolved_config, stacks
from ..models.config_json import Config, patched
from ..models.layer_kinds import BuiltStack, LayerOrigin, build_stack, misfits
from ..models.stacks import LAYER, is_of_vision_or_audio
from ..models.tokenizer.files import TOKENIZER_FILES
from ..models.tokenizer.tokenizer import tokens_digest
from ..models.view import ModelView, view_model
from ..report.manifest import Manifest
from .load_report import CannotReport, LoadReport, load_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = tuple[bool | None, str]
#: keys of config.json that no layer depends on
_OF_NO_LAYER = re.compile(r"(torch_)?dtype|transformers_version|_name_or_path|vocab_size|.*_token_id|architectures")
_SHOWN = 3  # names in a detail
_EMBEDDINGS = re.compile(r"embed_tokens|embed_in|tok_embeddings|word_embeddings|wte")


def tokenizer(checkpoint: Checkpoint, view: ModelView, manifest: Manifest) -> tuple[bool | None, str]:
    """Check that every token has a row in the embeddings, and the id that was planned.

    Returns:
        Whether it has (None: not known), and a detail.
    """
    if not any(name in manifest.files for name in TOKENIZER_FILES):
        return True, "the output has no tokenizer"
    if not any((checkpoint.folder / name).exists() for name in TOKENIZER_FILES):
        return None, "the folder has no tokenizer: tokenizer.save_pretrained(folder) puts it there"
    import transformers

    try:
        vocabulary = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False).get_vocab()
    except (ImportError, ValueError) as error:  # it may need a package that is not installed
        return None, f"transformers cannot load it here: {' '.join(str(error).split())}"
    planned = manifest.vocabulary
    if planned and tokens_digest(vocabulary) != planned["digest"]:
        return False, f"its {len(vocabulary)} tokens are not the {planned['tokens']} planned, or have other ids"
    name = next((n for n in view.before if _EMBEDDINGS.search(n)), None)
    if name is None:
        return None, "no tensor is named like embeddings"
    rows, (last, token) = checkpoint.tensors[name].shape[0], max((i, token) for token, i in vocabulary.items())
    if last >= rows:
        return False, f"token {token!r} has number {last}, {name} has {rows} rows"
    return True, f"{len(vocabulary)} tokens for {rows} rows of {name}"


class BuiltModel:
    """An output and its base as transformers builds them, without weights.

    Args:
        checkpoint: The output.
        view: The output by layer and role.
        manifest: Its manifest.
        sources: The models of the manifest; for one that is not available, the reason.
    """

    def __init__(
        self, checkpoint: Checkpoint, view: ModelView, manifest: Manifest, sources: Sequence[TensorSource | str]
    ):
        self.checkpoint, self.view, self.manifest, self.sources = checkpoint, view, manifest, sources

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
            config = transformers.AutoConfig.from_pretrained(self.checkpoint.folder, trust_remote_code=False)
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
                return True, f"{type(model).__name__}, {names} names and shapes"
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
        """Check that every layer is built like a layer that it comes from.

        Returns:
            Whether it is (None: not known), and a detail.
        """
        try:
            model = self.model
            path = main_stack(model, self.view.layer_prefix)
        except CannotBuild as error:
            return self._cannot_build(error)
        built, planned = len(stacks(model)[path]), self.manifest.num_layers
        if built != planned:
            return False, f"transformers builds {built} layers from config.json, planned {planned}"
        output = BuiltStack(describe_stack(model, path), self.checkpoint.config, type(model).__name__)
        numbers = {source.model: i for i, source in enumerate(self.manifest.sources)}
        known = {
            number: output
            for number in range(len(self.sources))
            if (config := self._config_of(number)) is not None and _same_layers(config, output.config)
        }
        origins, unknown = [], set()
        for layer in self.manifest.layers:
            found = []
            for source in layer.sources:
                number = numbers[source.model]
                try:
                    stack = self._stack(number, known)
                except CannotBuild as error:
                    return None, f"{source.model}: {error}"
                if stack is None or source.layer >= len(stack.layers):
                    unknown.add(number)
                else:
                    found.append(LayerOrigin(stack, source.layer, source.model))
            origins.append(found)
        if len(origins) != planned:  # a recipe that leaves the main stack as it is
            try:
                base = self._stack(self.manifest.donor, known)
            except CannotBuild as error:
                return None, f"the base: {error}"
            name = self.manifest.sources[self.manifest.donor].model
            origins = [[LayerOrigin(base, i, name)] if base else [] for i in range(planned)]
        if wrong := misfits(output, origins):
            return False, _list(map(str, wrong))
        if unknown:
            return None, "; ".join(str(self.sources[number]) for number in sorted(unknown))
        kinds = len({layer.same_function() for layer in output.layers})
        return True, f"{planned} layers of {kinds} {'kind' if kinds == 1 else 'kinds'}, each like the one it comes from"

    def _stack(self, number: int, known: dict[int, BuiltStack]) -> BuiltStack | None:
        """The built layers of a source; None where its config is not known."""
        if number not in known:
            config = self._config_of(number)
            if config is None:
                return None
            source = self.sources[number]
            prefix = self.view.layer_prefix
            if not isinstance(source, str):
                prefix = view_model(config, tuple(source.tensors), source.where).layer_prefix
            known[number] = build_stack(config, prefix)
        return known[number]

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
        return (None, f"{base}; nor the base") if base else (False, str(error))

    def _of_base(self, name: str) -> Iterable[str] | None:
        """The names in the base that excuse a name in the output, by the origins of its layer; None: excused."""
        assert self.base is not None
        match = LAYER.fullmatch(name)
        if match is None:
            return [name]
        head, suffix, layer = match["prefix"], match["suffix"], int(match["index"])
        stored = (LAYER.fullmatch(n) for n in self.base.tensors)
        numbers = {int(m["index"]) for m in stored if m and m["suffix"] == suffix}
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
    def _base_depth(self) -> int:
        assert self.base is not None
        return view_model(self.base.config, tuple(self.base.tensors), self.base.where).num_layers

    def _in_main_stack(self, prefix: str) -> bool:
        main = self.view.layer_prefix.rpartition(".{layer}")[0]
        sides = {"encoder", "decoder"}
        same_side = sides & set(prefix.split(".")) == sides & set(main.split("."))
        same_end = prefix.rpartition(".")[2] == main.rpartition(".")[2]
        return same_end and same_side and is_of_vision_or_audio(prefix) == is_of_vision_or_audio(main)


def build_language_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model on the meta device, with a language model's head where it has one.

    Raises:
        CannotBuild: transformers cannot build it.
    """
    return build(resolved_config(checkpoint.config), language_model=True)


def _untied(model: PreTrainedModel, checkpoint: Checkpoint, checksums: Mapping[str, str]) -> str | None:
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
