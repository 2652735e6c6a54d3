"""`check_fits`, the check that a prefix fits a base model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prefixfast.config.engine import BaseMismatch
from prefixfast.errors import BaseMismatchError, ConfigError, shown
from prefixfast.model.fingerprint import check_same_base, num_layers
from prefixfast.model.prefix_shape import PrefixShape, filled_layers, is_peft_table, own_layers, readers

if TYPE_CHECKING:
    from prefixfast.model.base import Model
    from prefixfast.model.fingerprint import Fingerprint
    from prefixfast.prefix.tuned_weights import TunedWeights


def described(prefix: PrefixShape, names: object = None) -> str:
    """Description of a prefix in errors: its name in a store or a mapping, else its digest.

    Args:
        prefix: Prefix, or its entry in a store.
        names: Mapping of names to prefixes; anything else gives no names.
    """
    name = getattr(prefix, "name", None)
    if name is None and isinstance(names, dict):
        name = next((n for n, p in names.items() if p is prefix), None)
    return f"the prefix {shown(name)}" if name is not None else f"the prefix {getattr(prefix, 'digest', '')[:12]}"


def base_mismatch(model: Model, prefixes: Sequence[PrefixShape | TunedWeights]) -> BaseMismatch | None:
    """Difference between a base model and those of prefixes that fit it, None if there is none.

    Args:
        model: Base model.
        prefixes: Prefixes for which `check_fits` has passed.
    """
    if model.allow_base_mismatch is None:
        return None
    weights = {(p.base or {}).get("weights") for p in prefixes} - {None}
    return "quantized" if weights - {model.fingerprint["weights"]} and model.fingerprint["weights"] else None


def check_base(model: Model, base: Fingerprint | None, what: str) -> None:
    """Raise `BaseMismatchError` if a fingerprint is that of another base model.

    Args:
        model: Base model.
        base: Fingerprint that a prefix or weights hold, None if unknown.
        what: Name of their owner in the error's message.
    """
    allowed = model.allow_base_mismatch == "quantized"
    check_same_base(base, model.fingerprint, what, model.quantization, allow_quantized=allowed)


def start_position(prefixes: Sequence[PrefixShape]) -> int:
    """Number of positions that the composed prefixes of a request take from its text.

    Of several prefixes before the same token the largest ``pos_start`` counts.
    """
    places = [(p.position, p.pos_start) for p in prefixes]
    return sum(max((start for own, start in places if own == place), default=0) for place in ("prefix", "infix"))


def check_composition(model: Model, positions: Iterable[str]) -> None:
    """Check that prefixes can be composed in one request.

    Args:
        model: Base model.
        positions: ``position`` of each prefix.

    Raises:
        ConfigError: If an infix and another prefix need different positions of the same tokens.
    """
    if model.handle.infix.has_fixed_positions and len(set(positions)) > 1:
        msg = (
            "a prefix and an infix together: this base has RoPE and the stored keys of both have positions from 0 on, "
            "but the prompt tokens between them cannot follow the one and precede the other; use one of them"
        )
        raise ConfigError(msg)


def check_fits(model: Model, prefix: PrefixShape, what: str = "the prefix") -> None:
    """Check that a prefix fits a base model.

    A prefix fits if its fingerprint is that of the base model, its layers exist in the base model, its heads have the
    base model's shapes, and all of its layers have the same number of rows. The rows of a PEFT adapter can be wider
    than those of a layer, and it has rows also for layers that read the keys of another layer; PEFT does not use these.

    Args:
        model: Base model.
        prefix: Prefix, or its entry in a store.
        what: Name of the prefix in the error's message.

    Raises:
        BaseMismatchError: If the prefix was made for another base model, or its shapes are not those of the base model.

    Example:
        >>> check_fits(base, prefix)
    """
    check_base(model, prefix.base, what)
    if prefix.position == "infix" and (reason := model.handle.infix.refusal):
        msg = f"{what} is an infix, which this base does not take: {reason}; train a prefix with position='prefix'"
        raise BaseMismatchError(msg)
    if is_peft_table(prefix, model.layers) and filled_layers(prefix, model.layers):
        return
    expected = {
        f"self.{i}.{x}": shape for i, s in enumerate(model.layers) for x, shape in zip("kv", s.row, strict=True)
    }
    got = {name: shape[1:] for name, shape in prefix.shapes.items()}
    if num_layers(prefix.base) is not None and (
        dead := next((i for i in prefix.layers if i in readers(model.layers)), None)
    ):
        msg = (
            f"{what}: layer {dead} of this base reads the keys of layer {model.layers[dead].source} and has no rows of "
            "its own, but the prefix has rows there, which would have no effect; train it again"
        )
        raise BaseMismatchError(msg)
    wrong = min((name for name, shape in got.items() if expected.get(name) != shape), default=None)
    # A PEFT adapter of a smaller model has the first layers, and does not say how many layers its base model has.
    unknown = (
        num_layers(prefix.base) is None
        and prefix.layers == tuple(range(len(prefix.layers)))
        and not set(own_layers(model.layers)) <= set(prefix.layers)
    )
    reasons = {
        f"{wrong}: {got.get(wrong or '')} where {expected.get(wrong or '')} is expected": wrong is not None,
        "the first ones, and it does not say for how many it was made": unknown,
        "of different lengths": len({shape[0] for shape in prefix.shapes.values()}) != 1,
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        named = (prefix.base or {}).get("name")
        trained = f"it was made for base {shown(named)}" if named else "was it trained on another model?"
        msg = (
            f"{what}: expected one length and layers of [P, H, D] as this base has {len(model.layers)} of "
            f"(self.0.k: {expected['self.0.k']}), got {len(got) // 2} layers, {reason}; {trained}"
        )
        raise BaseMismatchError(msg)
