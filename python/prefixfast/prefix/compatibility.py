"""`check_fits`, the check that a prefix fits a base model."""

from __future__ import annotations

from prefixfast.errors import BaseMismatchError, shown
from prefixfast.model.base import Model
from prefixfast.model.fingerprint import check_same_base, num_layers
from prefixfast.model.prefix_shape import PrefixShape


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


def check_fits(model: Model, prefix: PrefixShape, what: str = "the prefix") -> None:
    """Check that a prefix fits a base model.

    A prefix fits if its fingerprint is that of the base model, its layers exist in the base model, its heads have the
    base model's shapes, and all of its layers have the same number of rows.

    Args:
        model: Base model.
        prefix: Prefix, or its entry in a store.
        what: Name of the prefix in the error's message.

    Raises:
        BaseMismatchError: If the prefix was made for another base model, or its shapes are not those of the base model.

    Example:
        >>> check_fits(base, prefix)
    """
    check_same_base(prefix.base, model.fingerprint, what)
    expected = {f"self.{i}.{x}": (s.num_kv_heads, s.head_dim) for i, s in enumerate(model.layers) for x in "kv"}
    got = {name: shape[1:] for name, shape in prefix.shapes.items()}
    wrong = min((name for name, shape in got.items() if expected.get(name) != shape), default=None)
    # A PEFT adapter of a smaller model has the first layers, and does not say how many layers its base model has.
    unknown = (
        num_layers(prefix.base) is None
        and prefix.layers == tuple(range(len(prefix.layers)))
        and len(got) < len(expected)
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
