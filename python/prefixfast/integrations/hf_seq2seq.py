"""What `HFCache` replaces in an encoder-decoder base, whose encoder ``generate`` runs before it uses the cache.

While a cache is open, the encoder returns its tokens in place of states. The first forward with a cache reads them
back, runs the encoder packed and without padding, and starts the beams of each text.

Shape letters: B rows of the batch (one per beam), M tokens of the padded text, d width of the model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from prefixfast import _rust
from prefixfast.attention.plan import Layout, host_table
from prefixfast.attention.seq2seq_plan import seq2seq_decode_plan, seq2seq_prefill_plan
from prefixfast.config.sites import Site
from prefixfast.data.encode.seq2seq import pad_error
from prefixfast.engine.loop import Loop
from prefixfast.errors import CapacityError, ConfigError
from prefixfast.model.attach import KEY
from prefixfast.model.base import Model

if TYPE_CHECKING:
    from torch import nn

NO_TOKENS = "HFCache: expected at least one token in each row of input_ids, got none"
DIGITS, DIGIT = 5, 64  # a token is five digits, so that 16-bit floats hold it exactly


def states_of(ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """States ``[B, M, d]`` that hold token ids ``[B, M]``: their digits, plus one, and zeros.

    Args:
        ids: Token ids.
        width: Width d of the model, at least `DIGITS`.
        dtype: dtype of the states.
    """
    places = torch.arange(DIGITS, device=ids.device)
    states = ids.new_zeros(*ids.shape, width, dtype=dtype)
    states[..., :DIGITS] = (ids[..., None] // DIGIT**places % DIGIT + 1).to(dtype)
    return states


def ids_of(states: Tensor) -> Tensor:
    """Token ids ``[B, M]`` that `states_of` has put into states.

    Args:
        states: States ``[B, M, d]``.

    Raises:
        ConfigError: For other states.
    """
    digits = states[..., :DIGITS].double() - 1
    is_own = bool((digits == digits.round()).all() and (digits >= 0).all() and (digits < DIGIT).all())
    if not is_own or bool(states[..., DIGITS:].any()):
        msg = (
            "HFCache: expected generate to run the encoder itself, while the cache is open, got encoder_outputs of "
            "another call; pass input_ids to generate"
        )
        raise ConfigError(msg)
    places = torch.arange(DIGITS, device=states.device)
    return (digits.long() * DIGIT**places).sum(-1)


def texts_of(states: Tensor, mask: Tensor | None, num_beams: int) -> list[Tensor]:
    """Token ids of each text, without padding, int64 ``[M]``.

    Args:
        states: States ``[B, M, d]`` that the encoder returned.
        mask: 1 at each token that is no padding ``[B, M]``. None without padding.
        num_beams: Number of rows of each text.

    Raises:
        ConfigError: If the batch is empty or padded on the left, or neighbouring rows are not beams of one text.
    """
    ids = ids_of(states)
    if not ids.shape[1]:
        raise ConfigError(NO_TOKENS)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if seen.shape != ids.shape or not bool(seen[:, 0].all()) or bool((seen[:, 1:] > seen[:, :-1]).any()):
        msg = (
            f"attention_mask: expected one of {list(ids.shape)}, padded on the right, got {list(seen.shape)}; set "
            "tokenizer.padding_side = 'right'"
        )
        raise ConfigError(msg)
    ids = ids.masked_fill(~seen, -1)
    is_whole = len(ids) % num_beams == 0
    if not is_whole or bool((ids != ids[::num_beams].repeat_interleave(num_beams, 0)).any()):
        msg = (
            f"num_beams={num_beams}: expected as many equal rows for each text, got {len(ids)} rows; set num_beams to "
            "that of generate, or to its num_return_sequences"
        )
        raise ConfigError(msg)
    return [row[row >= 0] for row in ids[::num_beams]]


def check_texts(model: Model, texts: list[Tensor]) -> None:
    """Check that the encoder of a base reads texts as transformers does.

    Args:
        model: Encoder-decoder base.
        texts: Token ids of each text.

    Raises:
        CapacityError: If a text has more tokens than the encoder has positions.
        ConfigError: If a text has padding tokens in a base that gives them no position.
    """
    assert model.seq2seq is not None
    longest, most = max(map(len, texts)), model.seq2seq.encoder_positions
    if longest > most:
        msg = f"HFCache: the encoder reads at most {most} tokens, a text has {longest}; truncate it"
        raise CapacityError(msg)
    if error := next((found for text in texts if (found := pad_error(model.seq2seq, text.cpu().numpy()))), None):
        msg = f"HFCache: {error}"
        raise ConfigError(msg)


def beam_prefill(model: Model, loop: Loop, texts: list[Tensor], start: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
    """Run the encoder on texts, and the decoder on its start tokens.

    Args:
        model: Encoder-decoder base.
        loop: Loop with a waiting request for each text.
        texts: Token ids of each text.
        start: Start token of each row of the batch ``[B, 1]``, equal in the rows of a text.

    Returns:
        Logits ``[B, V]`` of the next tokens, and the decode row of each row of the batch ``[B]``.
    """
    header, buffer = _planned(loop)
    assert header.prefill is not None
    assert header.cross is not None
    assert header.encoder is not None
    layouts: dict[Site, Layout] = {
        "self": Layout(*header.prefill),
        "cross": Layout(*header.cross),
        "enc": Layout(*header.encoder),
    }
    order, beams = header.prefill_ids, len(start) // len(texts)
    assert len(order) == len(texts)
    chunk = host_table(buffer.numpy(), layouts["self"].views[0]["chunk"])
    rows = np.zeros((len(texts), beams), np.int64)
    rows[order] = chunk[:, :1] + np.arange(beams)
    tables = buffer.to(model.device)
    reach = max(header.prefill_reach, header.encoder_reach)
    plan = seq2seq_prefill_plan(tables, layouts, reach, loop.arena, model.backend)
    loop.scheduler.commit([])
    logits = model.forward(plan, start[::beams, 0][order], torch.cat([texts[i] for i in order]))
    by_text = torch.empty_like(logits)
    by_text[order] = logits
    return by_text.repeat_interleave(beams, 0), rows.reshape(-1)


def beam_decode(model: Model, loop: Loop, ids: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Run the decoder on one more token of each row.

    Args:
        model: Encoder-decoder base.
        loop: Loop of the rows.
        ids: Token ids ``[B]``.
        rows: Decode row of each row of the batch ``[B]``.

    Returns:
        Logits ``[B, V]`` of the next tokens.
    """
    header, buffer = _planned(loop)
    assert header.decode is not None
    assert header.decode_cross is not None
    layouts: dict[Site, Layout] = {"self": Layout(*header.decode), "cross": Layout(*header.decode_cross)}
    first = layouts["self"].views[0]
    place = np.zeros(int(rows.max()) + 1, np.int64)  # row of the batch by decode row
    place[rows] = np.arange(len(rows))
    at = torch.from_numpy(place[host_table(buffer.numpy(), first["row"])]).to(ids.device)
    longest = int(host_table(buffer.numpy(), first["lens"]).max())
    tables = buffer.to(model.device)
    plan = seq2seq_decode_plan(tables, layouts, header.decode_reach, longest, loop.arena, model.backend)
    loop.scheduler.commit([])
    logits = model.forward(plan, ids[at])
    return torch.empty_like(logits).index_copy_(0, at, logits)


def _planned(loop: Loop) -> tuple[_rust.StepHeader, Tensor]:
    """The next step of a loop, and the buffer of its tables."""
    buffer = torch.empty(loop.scheduler.buffer_len, dtype=torch.int32)
    return loop.scheduler.plan_step(buffer.numpy()), buffer


class Forwards:
    """Forwards of an encoder-decoder base that its open caches share. The last cache to close restores them.

    Args:
        hf: Hugging Face model.
    """

    _by_model: ClassVar[weakref.WeakKeyDictionary[PreTrainedModel, Forwards]] = weakref.WeakKeyDictionary()

    def __init__(self, hf: PreTrainedModel) -> None:
        self.num_open = 0
        self.hf = weakref.ref(hf)

    @classmethod
    def open(cls, hf: PreTrainedModel) -> Forwards:
        """Replace the forwards of a model, if no open cache has done so. `close` must be called once for each call.

        Args:
            hf: Hugging Face model.
        """
        found = cls._by_model.setdefault(hf, cls(hf))
        if not found.num_open:
            encoder = hf.get_encoder()
            _replace(hf, _with_caches(hf, hf.forward))
            _replace(encoder, _tokens_only(hf, encoder.forward))
        found.num_open += 1
        return found

    def close(self) -> None:
        """Restore the forwards, if no other cache is open."""
        self.num_open -= 1
        hf = self.hf()
        if not self.num_open and hf is not None:
            for module in (hf, hf.get_encoder()):
                _restore(module)


def _with_caches(hf: PreTrainedModel, own: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of a model, which lets the cache in ``past_key_values`` run its own."""

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache: Any = kwargs.get("past_key_values")
        if hasattr(cache, "_serves") and cache._serves(hf):
            return cache._forward(kwargs)
        return own(*args, **kwargs)

    return forward


def _tokens_only(hf: PreTrainedModel, own: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of an encoder, which returns its tokens unless it runs in a packed forward or its base was closed."""

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("prefixfast") is not None or KEY not in hf.__dict__:
            return own(*args, **kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            msg = "HFCache: expected input_ids, got inputs_embeds"
            raise ConfigError(msg)
        return BaseModelOutput(last_hidden_state=states_of(ids, int(hf.config.hidden_size), hf.dtype))

    return forward


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module a forward of its own, beside the one that it may have already."""
    module.__dict__["_prefixfast_forward"] = module.__dict__.get("forward")
    module.forward = forward


def _restore(module: nn.Module) -> None:
    """Undo `_replace`."""
    before = module.__dict__.pop("_prefixfast_forward")
    del module.forward
    if before is not None:
        module.forward = before
