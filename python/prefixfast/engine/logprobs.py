"""Log-probabilities of generated tokens: `TokenLogprob`, and their way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.engine.transfer import HostCopy, to_device


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities (natural log) at one generated token, from the model's logits before any logits processor.

    Attributes:
        token_id: Id of the chosen token.
        logprob: Log-probability of the chosen token.
        top: Log-probabilities of the most likely tokens by token id, the most likely token first.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class StepLogprobs:
    """Log-probabilities of one step while they are copied to the host, for the m rows that asked for them.

    Attributes:
        num_logprobs: Number of most likely tokens to report, by place of the row in the step.
        chosen: Log-probabilities of the chosen tokens ``[m]``.
        top: Log-probabilities of the n most likely tokens ``[m, n]``.
        top_ids: Ids of the n most likely tokens ``[m, n]``.
    """

    num_logprobs: dict[int, int]
    chosen: HostCopy
    top: HostCopy
    top_ids: HostCopy

    def read(self, tokens: list[int]) -> dict[int, TokenLogprob]:
        """Wait for the copies.

        Args:
            tokens: Chosen tokens of all rows of the step.

        Returns:
            Log-probabilities by place of the row in the step.
        """
        columns = zip(
            self.num_logprobs.items(), self.chosen.values(), self.top.values(), self.top_ids.values(), strict=True
        )
        return {
            place: TokenLogprob(tokens[place], chosen, dict(zip(top_ids[:n], top[:n], strict=True)))
            for (place, n), chosen, top, top_ids in columns
        }


def step_logprobs(
    logprobs: Tensor, tokens: Tensor, places: NDArray[np.int64], num_logprobs: NDArray[np.int64]
) -> StepLogprobs:
    """Start to copy the requested log-probabilities of a step to the host.

    Args:
        logprobs: Log-probabilities ``[m, V]`` of the rows that asked for them.
        tokens: Chosen tokens of all rows of the step.
        places: Places ``[m]`` of these rows in the step.
        num_logprobs: Number of most likely tokens to report for each of these rows ``[m]``.
    """
    chosen = logprobs.gather(1, tokens[to_device(places, logprobs.device)][:, None])[:, 0]
    top, top_ids = logprobs.topk(int(num_logprobs.max()))
    counts = dict(zip(places.tolist(), num_logprobs.tolist(), strict=True))
    return StepLogprobs(counts, HostCopy(chosen), HostCopy(top), HostCopy(top_ids))
