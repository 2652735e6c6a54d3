"""The cases that every backend of packed attention is held to, and the comparison: used by the tests in Triton's interpreter and by `make gpu` on a device.

A backend passes a case if each of its outputs and gradients is at most twice (gradients: three times) as far from the specification in fp64 as the
specification computed in the backend's own dtype, above a rounding floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast_kernels import reference
from prefixfast_kernels.testing.tables import Problem, Request, problem, relative_error
from prefixfast_kernels.tile_configs import Sizes
from prefixfast_kernels.torch_sdpa_lse import Options

NAMES = ("o", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
# Rounding floors: some gradients are zero in exact arithmetic (a window of one token without a prefix), so a ratio alone would divide by nothing.
FLOOR = {torch.float64: 1.5e-14, torch.float32: 4e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Case:
    """One problem: requests, rows of each block, (query heads, kv heads, head dim), options."""

    requests: tuple[Request, ...]
    blocks: tuple[int, ...]
    heads: tuple[int, int, int]
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    arena: bool = False

    @property
    def depth(self) -> int:
        """Most blocks that one query sees."""
        return max((len(r.blocks) for r in self.requests), default=0)

    def problem(self, sizes: Sizes) -> Problem:
        """The case's random problem, tables cut into ``sizes``."""
        hq, h, d = self.heads
        return problem(
            list(self.requests),
            list(self.blocks),
            num_heads=hq,
            num_kv_heads=h,
            head_dim=d,
            sizes=sizes,
            arena=self.arena,
        )


def _all(lengths: tuple[int, ...], *blocks: int, slides: bool = True) -> tuple[Request, ...]:
    return tuple(Request(n, tuple((b, slides) for b in blocks)) for n in lengths)


LONG = (280, 37, 1, 64, 130)
EACH = tuple(Request(n, ((i % 3, i != 1),)) for i, n in enumerate((70, 1, 200, 33, 16)))
COMPOSED = (
    Request(90, ((0, True), (1, False))),
    Request(33, ((2, True), (0, True), (1, True))),
    Request(5),
    Request(140, ((1, False),)),
)
INFIX = (Request(150, ((0, True),), blind=77), Request(40, ((1, True),)), Request(31, blind=0))
CHUNKS = (
    Request(50, ((0, True),), cached=100),
    Request(1, ((0, True),), cached=64),
    Request(70, ((1, False),)),
    Request(20, cached=7),
)
CASES = {
    "one for all": Case(_all(LONG, 0), (300,), (4, 2, 64)),
    "one each": Case(EACH, (10, 100, 33), (3, 3, 64)),
    "one each, short": Case(EACH, (10, 32, 7), (6, 2, 64)),
    "one row": Case(_all((3, 40), 0), (1,), (2, 2, 64)),
    "none": Case(_all((65, 7)), (), (8, 1, 64)),
    "composed": Case(COMPOSED, (40, 300, 7), (4, 1, 64)),
    "infix": Case(INFIX, (20, 65), (4, 2, 64)),
    "infix, both ways": Case(INFIX, (20, 65), (2, 2, 64), causal=False),
    "chunks in the arena": Case(CHUNKS, (48, 129), (4, 2, 64), arena=True),
    "chunks in the arena, window": Case(CHUNKS, (48, 129), (4, 2, 64), arena=True, window=30),
    "window": Case(_all(LONG, 0), (130,), (5, 5, 64), window=50),
    "window, some blocks stay": Case(COMPOSED, (40, 200, 7), (7, 1, 64), window=20),
    "window of two": Case(_all((9, 70), 0), (33,), (2, 1, 64), window=2),
    "cap": Case(_all((100, 30), 0), (70,), (2, 1, 64), softcap=2.0),
    "window and cap": Case(COMPOSED, (40, 130, 7), (4, 2, 128), window=33, softcap=3.0),
    "dim 80": Case(EACH, (10, 70, 33), (2, 2, 80)),
    "dim 96": Case(_all((130, 20), 0), (150,), (3, 1, 96)),
    "dim 128": Case(_all((200, 20), 0), (200,), (8, 2, 128)),
    "dim 256": Case(_all((100, 9), 0), (70,), (4, 1, 256)),
    "dim 256, window and cap": Case(_all((70, 9), 0), (20,), (2, 1, 256), window=33, softcap=5.0),
    "five heads each": Case(_all((60, 9), 0), (70,), (10, 2, 64)),
}

Run = Callable[[Problem, Case, Sizes], list[Tensor]]


def specification(p: Problem, case: Case) -> list[Tensor]:
    """Outputs and gradients of the specification in the dtype of ``p``, in the order of `NAMES`."""
    leaves = p.inputs()
    q, k, v, pk, pv = leaves
    o, lse = reference.attn(
        q,
        k,
        v,
        pk,
        pv,
        p.tables,
        scale=p.scale,
        window=case.window,
        softcap=case.softcap,
        causal=case.causal,
        slots=p.slots,
    )
    grads = torch.autograd.grad(o, leaves, p.do, allow_unused=True)
    return [
        o.detach(),
        lse.detach(),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)),
    ]


def triton(p: Problem, case: Case, sizes: Sizes) -> list[Tensor]:
    """Outputs and gradients of the Triton kernels; memory that they do not write reads NaN."""
    from prefixfast_kernels.prefix_bwd import attn_bwd  # triton is not everywhere
    from prefixfast_kernels.prefix_fwd import attn_fwd

    options, how = Options(p.scale, case.window, case.softcap), {"causal": case.causal, "slots": p.slots}
    with poisoned():
        o, lse = attn_fwd(p.q, p.k, p.v, p.prefix_k, p.prefix_v, p.tables, options, sizes, **how)  # type: ignore[arg-type]
        grads = attn_bwd(p.do, p.q, p.k, p.v, p.prefix_k, p.prefix_v, o, lse, p.tables, options, sizes, **how)  # type: ignore[arg-type]
    return [o, lse, *(g for g in grads if g is not None)]


class poisoned:
    """Within it, ``torch.empty`` gives NaN, so that what a kernel forgets to write is seen."""

    def __enter__(self) -> None:
        self.empty = torch.empty
        plain = self.empty

        def empty(*args: object, **how: object) -> Tensor:
            made = plain(*args, **how)  # type: ignore[call-overload]
            return made.fill_(torch.nan) if made.is_floating_point() else made

        torch.empty = empty

    def __exit__(self, *_: object) -> None:
        torch.empty = self.empty


def errors(
    case: Case, dtype: torch.dtype, sizes: Sizes, run: Run, *, device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Relative errors against the specification in fp64, in the order of `NAMES`: of ``run`` and of the specification in ``dtype``."""
    p = case.problem(sizes).cast(dtype)
    exact = specification(p.cast(torch.float64), case)
    same = specification(p, case)
    got = run(p.to(device), case, sizes)
    return [relative_error(a.cpu(), b) for a, b in zip(got, exact, strict=True)], [
        relative_error(a, b) for a, b in zip(same, exact, strict=True)
    ]


def within(got: list[float], same: list[float], floor: float) -> bool:
    """The rule of this module; NaN fails."""
    return all(e <= (2 if i < 2 else 3) * s + floor for i, (e, s) in enumerate(zip(got, same, strict=True)))
