"""Where the configs of two models make their layers compute differently, though their tensors have the same shapes.

All keys of a config are compared but those known not to matter, so that a key nobody thought of is compared, too. A
value that only one config has is compared with the default of transformers' class for the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .built import resolved_config
from .config_json import Config, section
from .stacks import DEPTH_KEYS

#: keys that change no layer's function, or that are checked elsewhere: depth and lists with an entry a layer, sizes
#: (by the tensors' shapes), the vocabulary, tied heads, quantisation
_IRRELEVANT = re.compile(
    r"""
    _.* | architectures | auto_map | model_type | transformers(_|\.js_).* | (torch_)?dtype | use_bfloat16 | use_cache
    | .*_cache | .*init(ializer)?(_.*)? | .*(_id|_ids|_index|_token|_tokens) | sep_token | vocab_size(_.*)?
    | .*vocab_size | .*(drop|pdrop|dropout|drop_rate|drop_prob|dropout_prob) | layerdrop | .*_loss.* | .*jitter.*
    | output_.* | return_dict.* | torchscript | pruned_heads | problem_type | id2label | label2id | num_labels
    | classif.* | task_specific_params | finetuning_task | chunk_size_feed_forward | is_(encoder_)?decoder
    | add_cross_attention | tie_.* | tf_legacy_.* | pretraining_tp | gradient_checkpointing | unsloth.*
    | attn_impl(ementation)? | use_flash.* | use_mambapy | language | title | prefix | tokenizer_class
    | quantization_config | compression_config | max_length | min_length | do_sample | temperature | top_k | top_p
    | typical_p | num_beams | num_beam_groups | num_return_sequences
    | (diversity|repetition|length|exponential_decay_length)_penalty | early_stopping
    | (encoder_)?no_repeat_ngram_size | bad_words_ids | (begin_)?suppress_tokens | remove_invalid_values
    | max_position_embeddings | n_positions | n_ctx | max_sequence_length | model_max_length | seq_length
    | hidden_size | intermediate_size | n_embd | n_inner | d_model | d_ff | ffn_dim | ffn_hidden_size
    | (moe|shared_expert)_intermediate_size | .*(en|de)coder_layers | max_window_layers | num_nextn_predict_layers
    | mtp_.*
    """,
    re.VERBOSE,
)
#: keys without which the numbers of a weight mean something else: heads, the rotated part of a head, the activation
_ACTIVATIONS = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "mlp_hidden_act",
    "activation",
    "hidden_dim_act",
)
_MEANING = (
    *_ACTIVATIONS, "num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "num_kv_heads",
    "head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "partial_rotary_factor", "rotary_pct",
    "rotary_dim", "rotary_ndims", "multi_query", "new_decoder_architecture", "alibi", "position_embedding_type",
    "parallel_attn", "use_parallel_residual", "parallel_residual", "scoring_func", "rope_interleave",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "mamba_n_heads",
    "mamba_num_heads", "mamba_d_head", "mamba_head_dim", "mamba_n_groups", "n_groups",
)  # fmt: skip
#: several names of one activation
_SAME_ACTIVATION = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
_ROPE = ("rope_parameters", "rope_scaling")
#: kinds of rotary embeddings that do not depend on the longest text that the config allows
_FIXED_ROPE = ("default", "linear", "llama3", "proportional", "mrope")
_MOST_LAYERS = 10_000  # of a config that is given to transformers, which may make lists of this length


#: keys of the parts of a config that describe other stacks
_PART = re.compile(r".*(text|vision|visual|image|audio|speech|video|encoder|decoder|backbone|talker|thinker|tower).*")
_OFF = (None, False, 0, 1, [], {})  # values that a model of another type may mean by not having the key


@dataclass(frozen=True)
class Difference:
    """A key whose values differ.

    Attributes:
        key: The key, with the keys of the mappings that it is in.
        wanted: The first model's value; None: it has none, and no default is known.
        got: The other model's value.
        fatal: Whether weights of one model mean nothing in the other.
    """

    key: str
    wanted: Any
    got: Any
    fatal: bool

    def __str__(self) -> str:
        wanted, got = ("nothing" if value is None else value for value in (self.wanted, self.got))
        return f"{self.key}: {got} instead of {wanted}"


def config_differences(
    config: Config, path: Sequence[str], other: Config, other_path: Sequence[str]
) -> tuple[Difference, ...]:
    """The differences between the layers of two models, as far as configs show them; the fatal ones first.

    Args:
        config: The first model's config.json.
        path: Keys that lead to its depth.
        other: The other model's config.json.
        other_path: Keys that lead to its depth.
    """
    above = len(path) > 1 and len(other_path) > 1
    one, two = _facts(config, path, above), _facts(other, other_path, above)
    given = [{*section(c, p)} for c, p in ((config, path), (other, other_path))]
    unlike = {key for key in given[0] ^ given[1] if not _IRRELEVANT.fullmatch(key)}
    if unlike or one.keys() != two.keys():  # importing transformers takes seconds, so it is asked only about defaults
        full = _completed(config, path, above), _completed(other, other_path, above)
        one, two = full if all(full) else (one, two)
    for facts in (one, two):
        if "num_attention_heads" in facts:
            facts.setdefault("num_key_value_heads", facts["num_attention_heads"])
        if "partial_rotary_factor" in {**one, **two}:
            facts.setdefault("partial_rotary_factor", 1.0)
    same_type = section(config, path).get("model_type") == section(other, other_path).get("model_type")
    found = []
    for key in {**one, **two}:
        wanted, got = one.get(key), two.get(key)
        off = not same_type and (key not in one or key not in two) and wanted in _OFF and got in _OFF
        if not (off or _equal(wanted, got)):
            found.append(Difference(key, wanted, got, _is_fatal(key, wanted, got)))
    return tuple(sorted(found, key=lambda d: _MEANING.index(d.key.rpartition(".")[2]) if d.fatal else len(_MEANING)))


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=1e-6)  # 9.999999747378752e-06 is 1e-05 in float32
    return one == two


def _is_fatal(key: str, wanted: object, got: object) -> bool:
    name = key.rpartition(".")[2]
    if wanted is None or got is None or name not in _MEANING:
        return False
    return not (name in _ACTIVATIONS and str(wanted).startswith("gelu") and str(got).startswith("gelu"))


def _facts(config: Config, path: Sequence[str], above: bool) -> dict[str, Any]:
    """All that the function of a stack's layers may depend on: key -> value. Without keys whose value is None.

    Args:
        config: config.json.
        path: Keys that lead to the stack's depth.
        above: Whether the config around the stack's section counts, too.
    """
    settings = section(config, path)
    depth = settings.get(path[-1]) if path else None
    values: dict[str, Any] = _facts(config, (), False) if above else {}
    for key, value in settings.items():
        per_layer = isinstance(value, list) and len(value) == depth
        part = isinstance(value, Mapping) and _PART.fullmatch(key)
        if not (_IRRELEVANT.fullmatch(key) or key in (*DEPTH_KEYS, *path, *_ROPE) or per_layer or part):
            _flatten(key, value, values)
    _add_rope(settings, values)
    if settings.get("use_sliding_window") is False:
        values.pop("sliding_window", None)
    for key in _ACTIVATIONS:
        if isinstance(values.get(key), str):
            values[key] = _SAME_ACTIVATION.get(values[key], values[key])
    return values


def _add_rope(settings: Config, values: dict[str, Any]) -> None:
    """Add the settings of rotary embeddings, which have several spellings."""
    rope: dict[str, Any] = {}
    for key in _ROPE:
        if isinstance(settings.get(key), Mapping):
            rope |= settings[key]
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind)
    if kind not in (None, "default"):
        values["rope_type"] = kind
    for key, value in rope.items():
        if isinstance(value, Mapping):  # one for each kind of layer
            inner: dict[str, Any] = {}
            _add_rope({"rope_parameters": value}, inner)
            values |= {f"{key}.{name}": entry for name, entry in inner.items()}
        else:
            _flatten(key if key in ("rope_theta", "partial_rotary_factor") else f"rope.{key}", value, values)
    longest = settings.get("max_position_embeddings")
    if kind is not None and kind not in _FIXED_ROPE and longest is not None:
        values["max_position_embeddings"] = longest


def _flatten(key: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for inner, entry in value.items():
            _flatten(f"{key}.{inner}", entry, into)
    elif value is not None:
        into[key] = value


def _completed(config: Config, path: Sequence[str], above: bool) -> dict[str, Any]:
    """`_facts` with all defaults of transformers' class; nothing where it cannot say."""
    depth = section(config, path).get(path[-1]) if path else None
    if not isinstance(depth, int) or depth > _MOST_LAYERS:
        return {}
    try:
        from transformers import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            full = resolved_config(config).to_dict()
        finally:
            logging.set_verbosity(verbosity)
        if path[0] not in full and "text_config" in full:  # an old form, which transformers divides into parts
            full = {**full, **full["text_config"]}
        return _facts(full, path, above)
    except Exception:  # a type that transformers does not know, or values that it refuses
        return {}
