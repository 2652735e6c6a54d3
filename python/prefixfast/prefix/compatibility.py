"""`check_fits`, the check that a prefix fits a base model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prefixfast.config.engine import BaseMismatch
from prefixfast.config.sites import SITE_NAMES, Site
from prefixfast.errors import BaseMismatchError, ConfigError, shown
from prefixfast.model.fingerprint import check_same_base, num_layers
from prefixfast.model.prefix_shape import PrefixShape, filled_layers, is_peft_table, own_layers, readers

if TYPE_CHECKING:
    from prefixfast.model.base import Model
    from prefixfast.model.fingerprint import Fingerprint
    from prefixfast.prefix.stored_tensors import StoredTensors


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


def base_mismatch(model: Model, prefixes: Sequence[PrefixShape | StoredTensors]) -> BaseMismatch | None:
    """Difference between a base model and those of prefixes that fit it, None if there is none.

    Args:
        model: Base model.
        prefixes: Prefixes and weights for which `check_fits` has passed.
    """
    if model.allow_base_mismatch is None:
        return None
    weights = {(p.base or {}).get("weights") for p in prefixes} - {None}
    return "quantized" if weights - {model.fingerprint["weights"]} and model.fingerprint["weights"] else None


def check_base(model: Model, base: Fingerprint | None, what: str, own: Fingerprint | None = None) -> None:
    """Raise `BaseMismatchError` if a fingerprint is that of another base model.

    Args:
        model: Base model.
        base: Fingerprint that a prefix or weights hold, None if unknown.
        what: Name of their owner in the error's message.
        own: Fingerprint of the base model, which takes milliseconds to read. None reads it.
    """
    allowed = model.allow_base_mismatch == "quantized"
    check_same_base(base, own or model.fingerprint, what, model.quantization, allow_quantized=allowed)


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

    A prefix fits if its fingerprint is that of the base model, its sites and layers exist in the base model, its heads
    have the base model's shapes, and all of its layers at a site have the same number of rows. The rows of a PEFT
    adapter can be wider than those of a layer, and it has rows also for layers that read the keys of another layer and,
    of an encoder-decoder model, for layers beyond the decoder's; PEFT does not use these.

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
    check_shapes(model, prefix, what)


def check_shapes(model: Model, prefix: PrefixShape, what: str) -> None:
    """Raise `BaseMismatchError` if the place or the rows of a prefix are not those that a base model takes.

    Args:
        model: Base model.
        prefix: Prefix, or its entry in a store.
        what: Name of the prefix in the error's message.
    """
    if prefix.position == "infix" and (reason := model.handle.infix.refusal):
        msg = f"{what} is an infix, which this base does not take: {reason}; train a prefix with position='prefix'"
        raise BaseMismatchError(msg)
    if is_peft_table(prefix, model.layers) and filled_layers(prefix, model.layers):
        return
    for site in prefix.sites:
        _check_site(model, prefix, site, what)


def _check_site(model: Model, prefix: PrefixShape, site: Site, what: str) -> None:
    """Raise `BaseMismatchError` if the rows of one site are not those of the base model."""
    if site not in model.sites:
        kind = "is decoder-only" if len(model.sites) == 1 else f"has the sites {', '.join(model.sites)}"
        msg = f"{what} has rows for {SITE_NAMES[site]} (site {site!r}), and this base {kind}; {_origin(prefix)}"
        raise BaseMismatchError(msg)
    shapes, layers = model.sites[site], prefix.layers_at(site)
    if num_layers(prefix.base) is not None and (dead := next((i for i in layers if i in readers(shapes)), None)):
        msg = (
            f"{what}: layer {dead} of this base reads the keys of layer {shapes[dead].source} and has no rows of "
            "its own, but the prefix has rows there, which would have no effect; train it again"
        )
        raise BaseMismatchError(msg)
    expected = {f"{site}.{i}.{x}": shape for i, s in enumerate(shapes) for x, shape in zip("kv", s.row, strict=True)}
    own = {name: shape for name, shape in prefix.shapes.items() if name.startswith(f"{site}.")}
    got = {name: shape[1:] for name, shape in own.items()}
    is_first_layers = num_layers(prefix.base) is None and layers == tuple(range(len(layers)))
    # A PEFT adapter of an encoder-decoder model has as many layers as the encoder; PEFT drops those beyond the decoder.
    is_longer = is_first_layers and len(model.sites) > 1 and len(layers) > len(shapes)
    beyond = {f"{site}.{i}.{x}" for i in range(len(shapes), len(layers)) for x in "kv"} if is_longer else set()
    wrong = min((name for name, shape in got.items() if expected.get(name) != shape and name not in beyond), default="")
    # A PEFT adapter of a smaller model has the first layers, and does not say how many layers its base model has.
    unknown = is_first_layers and not set(own_layers(shapes)) <= set(layers)
    reasons = {
        f"{wrong}: {got.get(wrong)} where {expected.get(wrong, 'no layer')} is expected": bool(wrong),
        "the first ones, and it does not say for how many it was made": unknown,
        "of different lengths": len({shape[0] for shape in own.values()}) != 1,
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        first = f"{site}.0.k"
        msg = (
            f"{what}: expected one length and layers of [P, H, D] as this base has {len(shapes)} of "
            f"({first}: {expected[first]}), got {len(got) // 2} layers, {reason}; {_origin(prefix)}"
        )
        raise BaseMismatchError(msg)


def _origin(prefix: PrefixShape) -> str:
    """Text about the base model of a prefix for errors."""
    named = (prefix.base or {}).get("name")
    return f"it was made for base {shown(named)}" if named else "was it trained on another model?"
