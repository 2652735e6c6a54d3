"""The most likely tokens of rows of logits: each instruction set against torch, and the memory that they take."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefixfast import ConfigError, GenerationParams, _rust
from prefixfast.engine.best_tokens import best_tokens
from prefixfast.engine.search import BeamSearch

PATHS = _rust.attend_paths()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocab", [1, 17, 600, 50265])
def test_they_are_those_of_log_softmax(vocab, path, dtype):
    g = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=g) * 3).to(dtype)
    count = min(9, vocab)
    logprobs, tokens = best_tokens(logits, count, path=path)
    exact = logits.double().log_softmax(-1)
    expected = torch.sort(exact, dim=-1, descending=True, stable=True)  # equal ones in ascending order of the token
    assert torch.equal(tokens, expected.indices[:, :count])
    torch.testing.assert_close(logprobs.double(), expected.values[:, :count], rtol=1e-6, atol=2e-6)


def test_rows_that_are_not_next_to_each_other():
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0))
    for view in (logits[::2], logits.T):
        for got, expected in zip(best_tokens(view, 3), best_tokens(view.clone(), 3), strict=True):
            assert torch.equal(got, expected)


def test_more_tokens_than_the_vocabulary_has_are_refused():
    with pytest.raises(ConfigError):
        best_tokens(torch.zeros(2, 4), 5)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_a_step_of_beams_makes_no_tensor_of_the_size_of_the_logits():
    search, rows = BeamSearch(4, 8, 16, torch.tensor([2])), torch.tensor([0, 4])
    for row in rows.tolist():
        search.start(row, GenerationParams(max_new_tokens=9, min_new_tokens=4, forced_eos_token_id=2))
    logits = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        search.step(logits, rows)
    assert largest.elements < 5000
