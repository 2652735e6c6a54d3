"""Quantized copies of the tiny Llama: int8 weights in a tensor subclass, and a `.gguf` file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny


class Int8(Tensor):
    """A weight in int8 with one scale for each row, which only linear products read, as in torchao."""

    q: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, scale: Tensor) -> Int8:
        made = Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype, device=q.device)
        made.q, made.scale = q, scale
        return made

    @classmethod
    def of(cls, t: Tensor) -> Int8:
        scale = t.abs().amax(1, keepdim=True) / 127
        return cls((t / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:
        return self.q * self.scale

    def __repr__(self) -> str:
        return f"Int8({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return F.linear(x, weight.dequantize(), bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].q, args[0].scale)
        msg = f"Int8 has no {func}"
        raise NotImplementedError(msg)


def quantized_llama(change: Callable[[Any], object] = lambda _: None, *, seed: int = 0) -> Any:
    """A Llama with int8 weights in all linear layers, made of weights that `change` may have changed."""
    model = tiny.make("llama", seed=seed)
    with torch.no_grad():
        change(model)
    for layer in [m for m in model.modules() if type(m) is nn.Linear]:
        layer.weight = nn.Parameter(Int8.of(layer.weight.detach()), requires_grad=False)
    return model


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of query and key weights in llama.cpp's order, which interleaves the two halves that RoPE rotates."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model, tokenizer, *, quantized: bool = False) -> None:
    """Write a Llama with a tokenizer as a `.gguf` file, in fp32 or in Q8_0."""
    c = model.config
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    tokens = tokenizer.convert_ids_to_tokens(list(range(c.vocab_size)))
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(c.vocab_size)])
    w.add_token_scores([0.0] * c.vocab_size)  # no merges, since the tokens have none that transformers could derive
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = paired(weight, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        data, kind = weight.numpy().astype(np.float32), gguf.GGMLQuantizationType.Q8_0
        if quantized and data.ndim == 2 and data.shape[1] % 32 == 0:
            w.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)), gguf.quants.quantize(data, kind), raw_dtype=kind
            )
        else:
            w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
