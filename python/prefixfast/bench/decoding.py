"""Settings of generation that every contender of a suite gets, whatever the base's ``generation_config`` says.

A field that a suite leaves out would come from the base: ``use_cache: false`` makes PEFT and transformers run without
a KV cache, and a penalty or a number of beams would hold for some contenders only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from prefixfast.engine.engine import end_ids
from prefixfast.engine.sampling_params import BUILT_IN, SAMPLING_FIELDS
from prefixfast.model.base import Model
from prefixfast.model.tokenizer import Tokenizer

# Entries of a generation_config that say nothing about how tokens are chosen, and those that a `Decoding` takes over.
PLAIN = {
    "use_cache": True,
    "do_sample": False,
    "num_beams": 1,
    "output_attentions": False,
    "output_hidden_states": False,
}
NEUTRAL = ("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Generation without sampling.

    Attributes:
        max_new_tokens: Largest number of new tokens of a request.
        min_new_tokens: Number of new tokens before which no end token is generated.
        end_ids: Ids of the end tokens.
        pad_id: Id of the padding token.
        num_beams: Number of beams, 1 for greedy decoding.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    end_ids: tuple[int, ...] = ()
    pad_id: int = 0
    num_beams: int = 1

    @classmethod
    def exactly(cls, new: int, model: Model) -> Decoding:
        """Greedy decoding of exactly ``new`` tokens, before which the engine's end tokens are not generated."""
        return cls(max_new_tokens=new, min_new_tokens=new, end_ids=tuple(end_ids(model.hf, model.tokenizer)))

    @classmethod
    def at_most(cls, new: int, hf: PreTrainedModel, tokenizer: Tokenizer, num_beams: int) -> Decoding:
        """Greedy decoding or beam search of at most ``new`` tokens, which the engine's end tokens end."""
        ends = tuple(end_ids(hf, tokenizer))
        return cls(max_new_tokens=new, end_ids=ends, pad_id=tokenizer.eos_id or 0, num_beams=num_beams)

    def apply(self, hf: PreTrainedModel) -> None:
        """Replace the ``generation_config`` of a base of transformers, so that ``generate`` inherits nothing else."""
        hf.generation_config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            num_beams=self.num_beams,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.end_ids) or None,
            pad_token_id=self.pad_id,
        )

    def params(self) -> dict[str, Any]:
        """The same settings as fields of `GenerationParams`, all of them given. The end tokens are the base's."""
        neutral = {name: getattr(BUILT_IN, name) for name in BUILT_IN.names() if name not in SAMPLING_FIELDS}
        return {
            **{name: value for name, value in neutral.items() if value is not None},
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "num_beams": self.num_beams,
        }

    def __str__(self) -> str:
        """One line for reports."""
        kind = "exactly" if self.min_new_tokens == self.max_new_tokens else "at most"
        ends = ", ".join(map(str, self.end_ids)) or "none"
        return (
            f"do_sample=False, num_beams={self.num_beams}, {kind} {self.max_new_tokens} new tokens, end tokens {ends}"
        )


def set_aside(hf: PreTrainedModel) -> dict[str, Any]:
    """Fields of a base's ``generation_config`` that `Decoding.apply` replaces and that would change speed or tokens."""
    found = hf.generation_config.to_diff_dict()
    return {name: value for name, value in found.items() if name not in NEUTRAL and value != PLAIN.get(name)}
