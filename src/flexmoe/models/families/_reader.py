"""Reader: typed access to config.json that forgets nothing. Enters: the JSON object. Leaves: checked values.

Every key ends in one of four ways: a family reads it; it is known not to change the answer (`HARMLESS`); it is known
to change the answer and is refused unless neutral (`REFUSED`); or it is unknown and named once in the log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from flexmoe.errors import ConfigError, UnsupportedModelError

T = TypeVar("T")
logger = logging.getLogger("flexmoe.models")

# Bookkeeping, training, and defaults of generation, which SamplingParams decides here.
HARMLESS = frozenset(
    """
    _name_or_path _commit_hash name_or_path transformers_version auto_map model_name
    architectures model_type dtype torch_dtype use_cache return_dict output_attentions output_hidden_states
    output_router_logits router_aux_loss_coef router_jitter_noise router_z_loss_coef aux_loss_alpha
    attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop
    initializer_range pretraining_tp gradient_checkpointing torchscript use_bfloat16 pruned_heads
    attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled use_flash_attention_2
    experts_implementation id2label label2id num_labels problem_type task_specific_params finetuning_task
    tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    unk_token_id forced_bos_token_id forced_eos_token_id max_length min_length max_new_tokens do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty max_sequence_length model_max_length
    unsloth_version unsloth_fixed tf_legacy_loss use_mambapy
    """.split()
)

# Features of other decoders: name -> the values that leave ours unchanged (besides null, false, 0 and empty).
REFUSED: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(
        """
        quantization_config compression_config is_encoder_decoder add_cross_attention cross_attention_hidden_size
        per_layer_config layer_types attention_bias mlp_bias qkv_bias o_bias lm_head_bias bias use_bias clip_qkv
        sliding_window sliding_window_pattern use_sliding_window attention_chunk_size no_rope_layers
        no_rope_layer_interval attention_sinks use_attention_sinks alibi use_alibi parallel_attn
        use_parallel_residual attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar
        attention_multiplier scale_embedding use_qk_norm qk_norm qk_layernorm rope_interleaved rope_interleave
        use_mrope kv_lora_rank q_lora_rank n_shared_experts num_shared_experts shared_expert_intermediate_size
        n_routed_experts first_k_dense_replace moe_layer_freq moe_intermediate_size mlp_only_layers
        e_score_correction_bias topk_method num_nextn_predict_layers zero_expert_num vision_config text_config
        audio_config lora_rank mod_enabled
        """.split(),
        (),
    ),
    **dict.fromkeys(
        """
        partial_rotary_factor rotary_pct rotary_emb_fraction logit_scale logits_scaling embedding_multiplier
        residual_multiplier lm_head_multiplier n_group topk_group routed_scaling_factor chunk_size_feed_forward
        decoder_sparse_step num_experts num_local_experts num_experts_per_tok
        """.split(),
        (1,),
    ),
    "position_embedding_type": ("rope", "rotary"),
    "scoring_func": ("softmax",),
    "hidden_activation": ("silu", "swish"),
    "norm_topk_prob": (),
    "no_bias": (True,),
}


class Reader:
    """Reads one JSON object. `defaults` stand in for absent keys, as in the family's transformers class."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], family: str, where: str) -> None:
        self._values = values
        self._defaults = defaults
        self._seen: set[str] = set()
        self.family = family
        self.where = where

    def get(self, kind: type[T], name: str) -> T | None:
        """The value, checked to be of `kind`; None if null, or absent without a default."""
        self._seen.add(name)
        value = self._values.get(name, self._defaults.get(name))
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.where}: {name}={value!r} is not {_ARTICLE.get(kind, kind.__name__)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.where}: {name}={value!r} is not a finite number.")
        return value

    def require(self, kind: type[T], name: str) -> T:
        """The value, which must be there."""
        value = self.get(kind, name)
        if value is None:
            state = "is null" if name in self._values else "is missing"
            raise ConfigError(f"{self.where}: {name} {state}; a {self.family} model needs it.")
        return value

    def count(self, *names: str) -> int:
        """A positive integer, under any of several spellings; two that disagree are an error."""
        present = [name for name in names if self._values.get(name) is not None] or [names[0]]
        value = self.require(int, present[0])
        for other in present[1:]:
            if self.require(int, other) != value:
                raise ConfigError(
                    f"{self.where}: {present[0]}={value} and {other}={self._values[other]} are the same option and "
                    "differ; remove one."
                )
        if value < 1:
            raise ConfigError(f"{self.where}: {present[0]}={value} is not a positive integer.")
        return value

    def positive(self, name: str) -> float:
        """A number above zero, which must be there."""
        value = self.require(float, name)
        if value <= 0:
            raise ConfigError(f"{self.where}: {name}={value:g} is not above 0.")
        return value

    def flag(self, name: str) -> bool:
        """A boolean; null and absence are false."""
        return bool(self.get(bool, name))

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, or one; null and absence are the empty tuple."""
        self._seen.add(name)
        value = self._values.get(name, self._defaults.get(name))
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(item) is int for item in items):
            raise ConfigError(f"{self.where}: {name}={value!r} is not an integer or a list of integers.")
        return tuple(items)

    def accept(self, name: str, *supported: object) -> None:
        """The key may be absent or null, or have one of these values; anything else is an unsupported feature."""
        self._seen.add(name)
        value = self._values.get(name, self._defaults.get(name))
        if value is not None and value not in supported:
            self.unsupported(name, value, " or ".join(_json(item) for item in supported))

    def skip(self, *names: str) -> None:
        """These keys do not matter for this model, whatever their values."""
        self._seen.update(names)

    def unsupported(self, name: str, value: object, supported: str) -> NoReturn:
        """Raise UnsupportedModelError naming the option, its value and what would be supported."""
        raise UnsupportedModelError(
            f"{self.where}: {name}={_json(value)} is not supported for a {self.family} model; supported: {supported}."
        )

    def unread(self) -> dict[str, Any]:
        """The keys, with a value other than null, that nobody asked for."""
        return {name: v for name, v in self._values.items() if name not in self._seen and v is not None}

    def finish(self) -> None:
        """Refuse the features nobody read; name the unknown keys in the log."""
        unread = self.unread()
        for name in unread.keys() & REFUSED.keys():
            if unread[name] not in (False, 0, "", [], {}, *REFUSED[name]):
                self.unsupported(name, unread[name], " or ".join(_json(v) for v in (*REFUSED[name], None)))
        unknown = sorted(name for name in unread if name not in REFUSED and name not in HARMLESS)
        if unknown:
            logger.warning("%s: unknown options, without effect here: %s", self.where, ", ".join(unknown))


_ARTICLE: Mapping[type, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false",
                                list: "a list", dict: "an object"}  # fmt: skip


def _json(value: object) -> str:
    """A value as config.json would spell it, shortened: a quantization_config is long."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
