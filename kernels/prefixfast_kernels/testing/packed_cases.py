"""Cases that every backend of packed attention must pass, and the comparison with the specification.

Tests run the cases in Triton's interpreter, and `make gpu` runs them on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast_kernels import reference
from prefixfast_kernels.inputs import AttnInputs, AttnOptions, NeedsGrad, OutputGrad
from prefixfast_kernels.testing.packed_problem import PackedProblem, make_problem
from prefixfast_kernels.testing.tables import Request
from prefixfast_kernels.testing.tolerance import relative_errors
from prefixfast_kernels.tile_selection import TileSizes

OUTPUT_NAMES = ("o", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")


@dataclass(frozen=True)
class Case:
    """One problem of packed attention.

    Attributes:
        requests: Requests in the order in which they are packed.
        blocks: Number of rows of each block.
        heads: Query heads, kv heads and head dim.
        window: Sliding window in tokens, 0 for none.
        softcap: Cap of the scores, 0 for none.
        causal: Whether keys after the query are hidden.
        arena: Whether the keys lie in an arena.
        max_distance: Largest distance of the position bias, 0 for no bias.
    """

    requests: tuple[Request, ...]
    blocks: tuple[int, ...]
    heads: tuple[int, int, int]
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    arena: bool = False
    max_distance: int = 0

    @property
    def depth(self) -> int:
        """Largest number of blocks that one query sees."""
        return max((len(r.blocks) for r in self.requests), default=0)

    def problem(self, sizes: TileSizes) -> PackedProblem:
        """Random problem of the case, with tables cut into ``sizes``."""
        requests, blocks = list(self.requests), list(self.blocks)
        return make_problem(requests, blocks, self.heads, sizes=sizes, arena=self.arena, max_distance=self.max_distance)

    def options(self, scale: float) -> AttnOptions:
        """Options of the attention."""
        return AttnOptions(scale, self.window, self.softcap, self.causal)


def _each(lengths: tuple[int, ...], *blocks: int, slides: bool = True) -> tuple[Request, ...]:
    """Requests of these lengths, all with the same blocks."""
    return tuple(Request(n, tuple((b, slides) for b in blocks)) for n in lengths)


LONG = (280, 37, 1, 64, 130)
EACH = tuple(Request(n, ((i % 3, i != 1),)) for i, n in enumerate((70, 1, 200, 33, 16)))
COMPOSED = (
    Request(90, ((0, True), (1, False))),
    Request(33, ((2, True), (0, True), (1, True))),
    Request(5),
    Request(140, ((1, False),)),
)
INFIX = (Request(150, ((0, True),), infix_at=77), Request(40, ((1, True),)), Request(31, infix_at=0))
CHUNKS = (
    Request(50, ((0, True),), cached=100),
    Request(1, ((0, True),), cached=64),
    Request(70, ((1, False),)),
    Request(20, cached=7),
)
CROSS = tuple(
    Request(n, sees, keys=m)
    for n, m, sees in zip(
        (5, 70, 1, 33), (133, 4, 18, 64), (((0, True),), ((1, True), (0, True)), (), ((0, True),)), strict=True
    )
)
CASES = {
    "one for all": Case(_each(LONG, 0), (300,), (4, 2, 64)),
    "one each": Case(EACH, (10, 100, 33), (3, 3, 64)),
    "one each, short": Case(EACH, (10, 32, 7), (6, 2, 64)),
    "one row": Case(_each((3, 40), 0), (1,), (2, 2, 64)),
    "none": Case(_each((65, 7)), (), (8, 1, 64)),
    "composed": Case(COMPOSED, (40, 300, 7), (4, 1, 64)),
    "infix": Case(INFIX, (20, 65), (4, 2, 64)),
    "infix, both ways": Case(INFIX, (20, 65), (2, 2, 64), causal=False),
    "chunks in the arena": Case(CHUNKS, (48, 129), (4, 2, 64), arena=True),
    "chunks in the arena, window": Case(CHUNKS, (48, 129), (4, 2, 64), arena=True, window=30),
    "window": Case(_each(LONG, 0), (130,), (5, 5, 64), window=50),
    "window, some blocks stay": Case(COMPOSED, (40, 200, 7), (7, 1, 64), window=20),
    "window of two": Case(_each((9, 70), 0), (33,), (2, 1, 64), window=2),
    "cap": Case(_each((100, 30), 0), (70,), (2, 1, 64), softcap=2.0),
    "window and cap": Case(COMPOSED, (40, 130, 7), (4, 2, 128), window=33, softcap=3.0),
    "dim 80": Case(EACH, (10, 70, 33), (2, 2, 80)),
    "dim 96": Case(_each((130, 20), 0), (150,), (3, 1, 96)),
    "dim 128": Case(_each((200, 20), 0), (200,), (8, 2, 128)),
    "dim 256": Case(_each((100, 9), 0), (70,), (4, 1, 256)),
    "dim 256, window and cap": Case(_each((70, 9), 0), (20,), (2, 1, 256), window=33, softcap=5.0),
    "encoder": Case(EACH, (10, 100, 33), (4, 2, 64), causal=False),
    "cross": Case(CROSS, (40, 100), (3, 3, 64), causal=False),
    "cross, causal": Case(CROSS, (40, 100), (4, 2, 64)),
    "bias": Case(COMPOSED, (40, 200, 7), (2, 2, 64), max_distance=128),
    "bias, encoder": Case(EACH, (10, 100, 33), (2, 2, 128), causal=False, max_distance=20),
    "bias, cross": Case(CROSS, (40, 100), (4, 2, 80), causal=False, max_distance=9),
    "bias, chunks in the arena, window": Case(CHUNKS, (48, 129), (2, 1, 64), arena=True, window=30, max_distance=70),
    "five heads each": Case(_each((60, 9), 0), (70,), (10, 2, 64)),
}

Run = Callable[[PackedProblem, Case, TileSizes], list[Tensor]]


def run_reference(p: PackedProblem, case: Case) -> list[Tensor]:
    """Outputs and gradients of the specification in the dtype of ``p``, in the order of `OUTPUT_NAMES`."""
    leaves = p.leaves()
    q, k, v, pk, pv = leaves
    o, lse = reference.attn(AttnInputs(q, k, v, pk, pv, p.slots), p.tables, case.options(p.scale), p.bias)
    grads = torch.autograd.grad(o, leaves, p.do, allow_unused=True)
    filled = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))
    return [o.detach(), lse.detach(), *filled]


def run_triton(p: PackedProblem, case: Case, sizes: TileSizes) -> list[Tensor]:
    """Outputs and gradients of the Triton kernels, with NaN in memory that they do not write."""
    from prefixfast_kernels.prefix_bwd import attn_bwd  # triton is not installed everywhere
    from prefixfast_kernels.prefix_fwd import attn_fwd

    options = case.options(p.scale)
    with nan_filled_empty():
        o, lse = attn_fwd(p.inputs, p.tables, options, sizes, p.bias)
        grads = attn_bwd(OutputGrad(p.do, o, lse), p.inputs, p.tables, options, sizes, NeedsGrad(), p.bias)
    return [o, lse, *(g for g in grads if g is not None)]


class nan_filled_empty:
    """Context in which ``torch.empty`` returns NaN, so that memory that a kernel fails to write is noticed."""

    def __enter__(self) -> None:
        self.empty = torch.empty
        plain = self.empty

        def empty(*args: object, **kwargs: object) -> Tensor:
            made = plain(*args, **kwargs)  # type: ignore[call-overload]
            return made.fill_(torch.nan) if made.is_floating_point() else made

        torch.empty = empty

    def __exit__(self, *_: object) -> None:
        torch.empty = self.empty


def output_errors(
    case: Case, dtype: torch.dtype, sizes: TileSizes, run: Run, *, device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Relative errors against the specification in fp64, in the order of `OUTPUT_NAMES`.

    Args:
        case: Case to run.
        dtype: Dtype of queries, keys and values.
        sizes: Tile sizes that the tables are cut into.
        run: Backend under test.
        device: Device of the backend.

    Returns:
        Errors of ``run`` and errors of the specification in ``dtype``.
    """
    p = case.problem(sizes).cast(dtype)
    exact = run_reference(p.cast(torch.float64), case)
    same_dtype = run_reference(p, case)
    return relative_errors(run(p.to(device), case, sizes), exact), relative_errors(same_dtype, exact)
