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
        most: Largest number of new tokens of a request.
        least: Number of new tokens before which no end token is generated.
        ends: Ids of the end tokens.
        pad: Id of the padding token.
        num_beams: Number of beams, 1 for greedy decoding.
    """

    most: int
    least: int = 0
    ends: tuple[int, ...] = ()
    pad: int = 0
    num_beams: int = 1

    @classmethod
    def exactly(cls, new: int, model: Model) -> Decoding:
        """Greedy decoding of exactly ``new`` tokens, before which the engine's end tokens are not generated."""
        return cls(most=new, least=new, ends=tuple(end_ids(model.hf, model.tokenizer)))

    @classmethod
    def at_most(cls, new: int, hf: PreTrainedModel, tokenizer: Tokenizer, num_beams: int) -> Decoding:
        """Greedy decoding or beam search of at most ``new`` tokens, which the engine's end tokens end."""
        ends = tuple(end_ids(hf, tokenizer))
        return cls(most=new, ends=ends, pad=tokenizer.eos_id or 0, num_beams=num_beams)

    def apply(self, hf: PreTrainedModel) -> None:
        """Replace the ``generation_config`` of a base of transformers, so that ``generate`` inherits nothing else."""
        hf.generation_config = GenerationConfig(
            max_new_tokens=self.most,
            min_new_tokens=self.least,
            num_beams=self.num_beams,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.pad,
        )

    def params(self) -> dict[str, Any]:
        """The same settings as fields of `GenerationParams`, all of them given. The end tokens are the base's."""
        neutral = {name: getattr(BUILT_IN, name) for name in BUILT_IN.names() if name not in SAMPLING_FIELDS}
        return {
            **{name: value for name, value in neutral.items() if value is not None},
            "max_new_tokens": self.most,
            "min_new_tokens": self.least,
            "num_beams": self.num_beams,
        }

    def __str__(self) -> str:
        """One line for reports."""
        count = f"exactly {self.most}" if self.least == self.most else f"at most {self.most}"
        ends = ", ".join(map(str, self.ends)) or "none"
        return f"do_sample=False, num_beams={self.num_beams}, {count} new tokens, end tokens {ends}"


def set_aside(hf: PreTrainedModel) -> dict[str, Any]:
    """Fields of a base's ``generation_config`` that `Decoding.apply` replaces and that would change speed or tokens."""
    found = hf.generation_config.to_diff_dict()
    return {name: value for name, value in found.items() if name not in NEUTRAL and value != PLAIN.get(name)}
