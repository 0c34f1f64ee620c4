"""config.json read key by key, so that at the end it is known which keys nobody understood."""

from __future__ import annotations

from typing import Any

from engine.config.base import brief
from engine.errors import UserError

# Keys without influence on the logits of a whole text.
_HARMLESS = frozenset((
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "auto_map",
    "id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states", "is_decoder",
    "chunk_size_feed_forward", "initial_context_length", "unsloth_fixed", "unsloth_version", "task_specific_params",
    "tokenizer_class", "finetuning_task", "name_or_path",
))  # fmt: skip
_MISSING = object()


class Settings:
    """``get`` marks a key as understood; ``expect_nothing_else`` refuses the rest."""

    def __init__(self, config: dict, defaults: dict[str, Any], where: str):
        self.config, self.defaults, self.where = config, defaults, where
        self.understood: set[str] = set()

    def error(self, key: str, problem: str, fix: str = "This engine has no such model") -> UserError:
        return UserError(problem, where=f"{self.where}: {key}", fix=fix)

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value, or what Transformers takes where there is none. Raises ``UserError`` if it must be there."""
        self.understood.add(key)
        if key in self.config:
            return self.config[key]
        if key in self.defaults:
            return self.defaults[key]
        if default is _MISSING:
            raise self.error(key, "is missing", "Download the model again")
        return default

    def expect(self, key: str, *values: Any) -> None:
        """Refuses any value but these; no value is as good as the first."""
        found = self.get(key, values[0])
        if found not in values or (isinstance(found, bool) != isinstance(values[0], bool) and found is not None):
            raise self.error(key, f"is {brief(found)}, this engine computes {values[0]}")

    def expect_nothing_else(self) -> None:
        """Refuses keys that are set and that nobody has asked for."""
        for key, value in self.config.items():
            unset = value is None or value is False or value in ([], {})
            if key not in self.understood | _HARMLESS and not key.startswith("_") and not unset:
                raise self.error(key, f"is a setting that is not known here ({brief(value)})",
                                 "If it does not change what the model computes, remove it from config.json")
