"""`PrefixLM`, the model ``prefixfast`` of EleutherAI's lm-evaluation-harness: a base model with a learned prefix.

An `Engine` scores and generates. The module needs the extra ``eval``. In Python, importing the module registers the
model. On the command line, this module runs lm-eval's own commands with the model registered::

    python -m prefixfast.integrations.lm_eval run \
        --model prefixfast --model_args pretrained=BASE,prefix=FOLDER --tasks ...
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prefixfast.engine.engine import Engine
from prefixfast.engine.seq2seq_prompts import check_decoder_only
from prefixfast.errors import ConfigError
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.prefix.prefix import Prefix

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    msg = "lm-eval is not installed; run pip install prefixfast[eval]"
    raise ConfigError(msg) from e

DEFAULT_MAX_GEN_TOKS = 256
TokenPair = tuple[tuple[str, str] | None, list[int], list[int]]  # texts of context and target, tokens of both
IGNORED = ("parallelize", "trust_remote_code", "max_batch_size", "batch_size")  # lm-eval passes these to every model


@register_model("prefixfast")
class PrefixLM(TemplateLM):
    """Base model with a prefix, as a model of lm-eval.

    Args:
        pretrained: Base model, as `load` takes it.
        prefix: `Prefix`, its folder or its hub id. None evaluates the base model alone.
        max_length: Largest number of tokens of a text. None takes what base model and prefix leave.
        max_gen_toks: Largest number of new tokens for tasks that set none.
        dtype: Compute dtype of the base model.
        device: Device of the base model. None means ``"auto"``, and so does a CUDA device, lm-eval's default, on a
            machine without a GPU.
        other: Options that lm-eval passes to every model (``batch_size``, ...). They have no effect, since the engine
            forms its batches by tokens.

    Raises:
        ConfigError: For an unknown option, an encoder-decoder base model, or one that cannot be loaded.

    Example:
        >>> model = PrefixLM(base, prefix)  # for lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])
        >>> model.max_length, model.tok_encode("tea")
        (146, [87, 72, 68])
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel | Model,
        prefix: Prefix | str | Path | None = None,
        *,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        dtype: str = "auto",
        device: str | None = None,
        **other: Any,
    ) -> None:
        super().__init__()
        if unknown := set(other) - set(IGNORED):
            msg = f"PrefixLM: unknown options {sorted(unknown)}; known are max_length, max_gen_toks, dtype and device"
            raise ConfigError(msg)
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"
        model = load(pretrained, dtype=dtype, device=device) if isinstance(pretrained, str | Path) else load(pretrained)
        check_decoder_only(model, "lm-eval", "its tasks score the continuation of a text; use prefixfast eval")
        self.prefix = Prefix.from_pretrained(prefix, model=model) if isinstance(prefix, str | Path) else prefix
        pos_start = 0 if self.prefix is None else self.prefix.pos_start
        self.max_length = min(max_length or model.max_positions, model.max_positions - pos_start)
        self.max_gen_toks = max_gen_toks
        self.engine = Engine(model, max_model_len=self.max_length)
        self.tokens, self.tokenizer = model.require_tokenizer(), model.require_tokenizer().hf

    @property
    def eot_token_id(self) -> int:
        """Id of the end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context: the begin token, else the end token."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in lm-eval's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text.

        Args:
            string: Text.
            add_special_tokens: Whether the tokenizer adds its special tokens. None adds them unless the text starts
                with the begin token.
        """
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = begin is None or not string.startswith(begin)
        ids: list[int] = self.tokens.encode([string], add_special_tokens=add_special_tokens)[0].tolist()
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation by the tokenizer's chat template.

        Args:
            chat_history: Messages with the keys ``role`` and ``content``.
            add_generation_prompt: Whether the assistant's next turn is opened. If not, the last message is continued.
        """
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenPair], disable_tqdm: bool = False, **other: Any
    ) -> list[tuple[float, bool]]:
        cut = [(context[-(self.max_length + 1 - len(target)) :], target) for _, context, target in requests]
        targets, shown = [target for _, target in cut], False if disable_tqdm else None
        scores = self.engine.score([c for c, _ in cut], self.prefix, targets=targets, progress=shown)
        found = [(s.logprob, s.is_greedy) for s in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` tokens in which each token is scored once.

        Args:
            requests: Requests of lm-eval, each with one text.
            disable_tqdm: Whether to hide the progress.
        """
        windows: list[TokenPair] = []
        counts = []
        for request in requests:
            (text,) = request.args
            cuts = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            own: list[TokenPair] = [(None, *make_disjoint_window(window)) for window in cuts]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, cut before the first stop string.

        Args:
            requests: Requests of lm-eval, each with a context and generation options.
            disable_tqdm: Whether to hide the progress.
        """
        batch: list[dict[str, Any]] = []
        for request in requests:
            context, options = request.args
            params = dict(options)
            until = params.pop("until", None) or []
            stops = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
            new = params.pop("max_gen_toks", params.pop("max_new_tokens", self.max_gen_toks))
            if not params.get("do_sample") or params.get("temperature") == 0:
                params["do_sample"] = False
                params = {k: v for k, v in params.items() if k not in ("temperature", "top_p", "top_k", "min_p")}
            if not new < self.max_length:
                msg = (
                    f"max_gen_toks: expected less than max_length ({self.max_length}), got {new}; set max_gen_toks in "
                    "model_args or in the task"
                )
                raise ConfigError(msg)
            ids = self.tok_encode(context)[-(self.max_length - new) :]
            batch.append({"input_ids": ids, "params": {**params, "max_new_tokens": new, "stop_strings": stops}})
        results = self.engine.generate(batch, self.prefix, progress=False if disable_tqdm else None)
        texts = []
        for request, item, result in zip(requests, batch, results, strict=True):
            at = [result.text.find(s) for s in item["params"]["stop_strings"] if s in result.text]
            texts.append(result.text[: min(at, default=len(result.text))])
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(cli_evaluate())
