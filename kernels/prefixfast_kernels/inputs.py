"""Arguments of packed and decode attention, grouped for the backends.

Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, P prefix rows, R decode rows,
d hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttnOptions(NamedTuple):
    """Options of attention that do not depend on the tables.

    Attributes:
        scale: Factor on the scores ``q @ k.T``.
        window: Sliding window in tokens, 0 for none. A key at position p is visible from position t only if
            ``p > t - window``.
        softcap: Cap of the scores, ``softcap * tanh(score / softcap)``, or 0 for none.
        causal: Whether keys after the query are hidden. Prefix rows are never after the query. Decode ignores this
            option, because all keys of a decode row come before its query.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    causal: bool = True


class AttnInputs(NamedTuple):
    """Tensors of packed attention.

    Attributes:
        q: Queries ``[N, HQ, D]``.
        k: Keys ``[M, H, D]``, with ``HQ % H == 0``. Query head h reads kv head ``h // (HQ // H)``.
        v: Values ``[M, H, D]``.
        prefix_k: Prefix keys ``[sum P, H, D]``, or None without prefixes. May be ``k`` itself, an arena.
        prefix_v: Prefix values ``[sum P, H, D]``, or None without prefixes.
        slots: Arena rows of the keys, int32: key j of a segment is row ``slots[first key + j]`` of ``k``. None if the
            keys are the rows of ``k`` in order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor | None = None
    prefix_v: Tensor | None = None
    slots: Tensor | None = None


class DecodeInputs(NamedTuple):
    """Tensors of decode attention, one query for each row.

    Attributes:
        q: Queries ``[R, HQ, D]``.
        k_arena: Keys ``[arena rows, H, D]``.
        v_arena: Values ``[arena rows, H, D]``.
        slot_table: Arena row of each token of each row, int32 ``[rows, Tmax]``.
        prefix_k: Prefix keys ``[rows, H, D]``, or None if the prefix rows are rows of ``k_arena``.
        prefix_v: Prefix values ``[rows, H, D]``, or None if the prefix rows are rows of ``v_arena``.
    """

    q: Tensor
    k_arena: Tensor
    v_arena: Tensor
    slot_table: Tensor
    prefix_k: Tensor | None = None
    prefix_v: Tensor | None = None

    @property
    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values that hold the prefix rows: the pair of their own if there is one, else the arena."""
        if self.prefix_k is None or self.prefix_v is None:
            return self.k_arena, self.v_arena
        return self.prefix_k, self.prefix_v


class OutputGrad(NamedTuple):
    """Outputs of a forward and the gradient of its output ``o``, as a backward needs them.

    Attributes:
        do: Gradient of ``o``, ``[N, HQ, D]``.
        o: Output of the whole attention ``[N, HQ, D]``.
        lse: Natural log-sum-exp of the whole attention ``[N, HQ]``.
    """

    do: Tensor
    o: Tensor
    lse: Tensor


class NeedsGrad(NamedTuple):
    """Gradients that a backward computes.

    Attributes:
        own: Whether q, k or v needs a gradient. Layer 0 above a frozen embedding does not.
        prefix: Whether the prefix needs a gradient.
    """

    own: bool = True
    prefix: bool = True


class AttnGrads(NamedTuple):
    """Gradients of packed attention, None where not needed.

    Attributes:
        q: Gradient of the queries ``[N, HQ, D]``.
        k: Gradient of the keys ``[M, H, D]``.
        v: Gradient of the values ``[M, H, D]``.
        prefix_k: Gradient of the prefix keys ``[sum P, H, D]``, summed over all users of each block.
        prefix_v: Gradient of the prefix values ``[sum P, H, D]``, summed over all users of each block.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    prefix_k: Tensor | None
    prefix_v: Tensor | None


class OutputLayer(NamedTuple):
    """A frozen output layer: logits of hidden states ``[n, d]`` are ``hidden @ weight.T + bias``.

    Attributes:
        weight: Weight ``[V, d]``.
        bias: Bias ``[V]``, or None.
        softcap: Cap of the logits, ``softcap * tanh(logit / softcap)``, or 0 for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float = 0.0
