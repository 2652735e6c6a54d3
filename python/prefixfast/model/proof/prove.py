"""`prove`, the comparison of an attached model with its own forward."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedModel

from prefixfast.attention.ops import Backend
from prefixfast.errors import ConfigError
from prefixfast.model.dry_run import FAILURES, LayerShape
from prefixfast.model.proof.cases import LONGEST_WINDOW, make_cases, random_kv
from prefixfast.model.proof.infix import InfixSupport, infix_support
from prefixfast.model.proof.own import own_logits
from prefixfast.model.proof.packed import PackedModel
from prefixfast.model.proof.precision import float32_weights
from prefixfast.model.proof.relative_error import relative_error
from prefixfast.model.proof.serving import serve
from prefixfast.model.proof.windows import window_differences
from prefixfast.model.supported_models import unsupported_layers

logger = logging.getLogger(__name__)
BACKEND = Backend("torch")
ONE, MANY = "one sequence", "packed sequences"
CAUSES = {
    ONE: "its positions or scores are computed outside of transformers' attention interface",
    MANY: "its packed sequences change each other, or position_ids have no effect",
}


def prove(
    model: PreTrainedModel, shapes: Sequence[LayerShape], windows: Sequence[int], own: Sequence[str | None]
) -> InfixSupport:
    """Raise `ConfigError` if an attached model gives other results than its own forward.

    The model computes several packed sequences with different prefixes, by the plans of training and of the engine. Its
    own forward computes each sequence alone: a text and its continuation without a cache, and random prefixes in a
    `DynamicCache` if the model's cache holds the keys and values of attention. Half precision is compared in fp32.

    Args:
        model: Attached model.
        shapes: Heads of every layer.
        windows: Sliding window that each layer passes to attention, 0 for none.
        own: Attention implementation of each config before the model was attached.

    Returns:
        How the model takes prefixes before the last prompt token.
    """
    what, remark = f"{type(model).__name__} ({model.config.model_type})", unsupported_layers(model)
    if getattr(model.config.get_text_config(), "max_position_embeddings", None) is None:
        msg = f"cannot attach {what}: its configuration has no max_position_embeddings, which limits prompts and texts"
        raise ConfigError(msg)
    try:
        faults = _window_faults(model, windows)
        if not faults:
            with float32_weights(model) as (dtype, limit):
                packed = PackedModel(model, shapes, BACKEND, dtype)
                faults = _result_faults(packed, windows, own, limit)
                infix = infix_support(packed, windows, limit) if not faults else InfixSupport()
    except FAILURES as e:
        msg = f"cannot attach {what}: the comparison with its own forward fails: {type(e).__name__}: {e}{remark}"
        raise ConfigError(msg) from e
    if faults:
        msg = (
            f"cannot attach {what}: its results differ from its own forward: {'; '.join(faults)}{remark}; run it with "
            "transformers alone"
        )
        raise ConfigError(msg)
    return infix


def _window_faults(model: PreTrainedModel, windows: Sequence[int]) -> list[str]:
    """Layers whose mask and window differ."""
    found = window_differences(model, windows)
    if found is None and max(windows) > LONGEST_WINDOW:
        return [f"the mask, which cannot be read, while its layers pass a window of {max(windows)} tokens to attention"]
    return found or []


def _result_faults(packed: PackedModel, windows: Sequence[int], own: Sequence[str | None], limit: float) -> list[str]:
    """Features whose logits differ by more than rounding, and the probable cause."""
    errors = _errors(packed, windows, own)
    wrong = [name for name, e in errors.items() if not e < limit]
    causes = [cause for name, cause in CAUSES.items() if name in wrong][:1]
    logger.debug("%s: relative errors %s, limit %.0e", type(packed.model).__name__, errors, limit)
    return [f"{name} (relative error {errors[name]:.0e})" for name in wrong] + causes


def _errors(packed: PackedModel, windows: Sequence[int], own: Sequence[str | None]) -> dict[str, float]:
    """Largest relative error of each feature."""
    model, shapes = packed.model, packed.shapes
    cases = make_cases(model, windows)
    text, short = (c.ids for c in cases.plain)
    together, text_kv = packed.texts([short, text[: cases.split]])
    kv = [[(k[len(short) :], v[len(short) :]) for k, v in text_kv]]
    kv += [random_kv(p, text_kv, shapes, seed) for seed, p in enumerate(cases.random)]
    expected = own_logits(model, cases, kv[1:], shapes, own)
    assert expected[0] is not None
    # The first of several packed sequences is computed right even if the model ignores position_ids.
    found = [(ONE, together[: len(short)], expected[1]), (MANY, together[len(short) :], expected[0][: cases.split])]
    rest = cases.all[1:]
    parts = packed.training(cases, kv).split([len(c.ids) for c in rest])
    found += [(c.name, part, wanted) for c, part, wanted in zip(rest, parts, expected[1:], strict=True)]
    for served in serve(packed, cases, kv):
        of_case = expected[served.case]
        found.append((served.step, served.logits, None if of_case is None else of_case[served.token]))
    errors: dict[str, float] = {}
    for name, got, wanted in found:
        if wanted is not None:  # the model's cache has another form
            errors[name] = max(errors.get(name, 0.0), relative_error(got, wanted))
    return errors
