"""Rows of token ids, as TRL and PEFT read them: ``input_ids`` with ``labels`` and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefixfast.data.encode.token_ids import ANY_VOCABULARY, Ints, int_array, vocabulary_error
from prefixfast.data.formats import MASK_KEYS
from prefixfast.data.row_values import json_hint
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import shown

IGNORED_LABEL = -100
TARGETS = ("labels", *MASK_KEYS)


def tokenized_row(row: Row, number: int, vocab_size: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Token ids of a row, and its targets.

    A token is a target if none of the keys that the row has excludes it: a label of -100, or a 0 in ``completion_mask``
    or ``assistant_masks``. Tokens with a 0 in ``attention_mask`` are padding and are left out, wherever they stand.

    Args:
        row: Row with ``input_ids``.
        number: Number of the row, for errors.
        vocab_size: Number of rows of the embedding.

    Returns:
        Token ids, int32 ``[N]``, and the targets, bool ``[N]``; none are targets if the row has none of the keys.

    Raises:
        DataError: If a value is not a flat list of numbers of the right length and range.
    """
    ids, attended = padded_ids(row, number, vocab_size)
    targets = np.zeros(len(ids), bool)
    if any(row.get(key) is not None for key in TARGETS):
        targets = np.ones(len(ids), bool)
        if row.get("labels") is not None:
            targets &= _labelled(row, number, ids, attended)
        for key in MASK_KEYS:
            if row.get(key) is not None:
                targets &= _mask(row, number, key, len(ids))
    return _attended_ids(row, number, ids, attended, vocab_size), targets[attended]


def check_tokenized(row: Row, number: int) -> None:
    """Check a row with ``input_ids`` as far as the kind of the base model is not needed.

    Labels have the length of ``input_ids`` for a decoder-only base model, and a length of their own otherwise.

    Raises:
        DataError: If a value is not a flat list of numbers, or its labels have no target.
    """
    ids, attended = padded_ids(row, number, ANY_VOCABULARY)
    for key in MASK_KEYS:
        if row.get(key) is not None:
            _mask(row, number, key, len(ids))
    if row.get("labels") is not None:
        label_row(row, number, ANY_VOCABULARY)
    _attended_ids(row, number, ids, attended, ANY_VOCABULARY)


def check_has_targets(row: Row, number: int) -> None:
    """Raise `DataError` for a training row without any of the keys of targets."""
    if all(row.get(key) is None for key in TARGETS):
        got = sorted(map(str, row))
        raise row_error(row, number, f"expected input_ids and one of the keys {', '.join(TARGETS)}, got {got}")


def encoder_row(row: Row, number: int, vocab_size: int) -> Ints:
    """Token ids that an encoder reads, int32: ``input_ids`` without padding.

    Args:
        row: Row with ``input_ids``.
        number: Number of the row, for errors.
        vocab_size: Number of rows of the encoder's embedding.

    Raises:
        DataError: If the row is malformed, or has masks of targets.
    """
    for key in MASK_KEYS:
        if row.get(key) is not None:
            msg = f"{key}: the targets of an encoder-decoder base are labels, with a length of their own; leave it out"
            raise row_error(row, number, msg)
    return _attended_ids(row, number, *padded_ids(row, number, vocab_size), vocab_size)


def label_row(row: Row, number: int, vocab_size: int) -> NDArray[np.int64]:
    """Labels of a row, which can have another length than its ``input_ids``.

    Args:
        row: Row with ``labels``.
        number: Number of the row, for errors.
        vocab_size: Number of rows of the decoder's embedding.

    Returns:
        Labels, int64, of which one at least is not -100.

    Raises:
        DataError: If they are not a flat list of token ids and -100.
    """
    given = row.get("labels")
    labels = int_array(given)
    if labels is None:
        expected = "labels: expected a list of token ids and -100"
        raise row_error(row, number, f"{expected}, got {shown(given)}{json_hint(given)}")
    own = labels[labels != IGNORED_LABEL]
    if error := vocabulary_error(own, vocab_size):
        raise row_error(row, number, f"labels: {error}")
    if not len(own):
        raise row_error(row, number, "labels: expected at least one target, got -100 everywhere")
    return labels


def check_decoder_inputs(row: Row, number: int, ids: Ints) -> None:
    """Check that inputs of the decoder that a row has beside its labels are those that the labels give.

    Args:
        row: Row with ``labels``.
        number: Number of the row, for errors.
        ids: Inputs of the decoder by the labels, int32 ``[n]``. Later ones change nothing.

    Raises:
        DataError: If ``decoder_input_ids`` or ``decoder_attention_mask`` are others.
    """
    expected = {"decoder_input_ids": ids, "decoder_attention_mask": np.ones_like(ids)}
    for name, values in expected.items():
        if row.get(name) is None:
            continue
        given = int_array(row[name])
        if given is None or given[: len(ids)].tolist() != values.tolist():
            msg = f"{name}: expected the ones that the labels give ({shown(values.tolist())}), got {shown(row[name])}"
            raise row_error(row, number, f"{msg}; leave it out")


def padded_ids(row: Row, number: int, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """``input_ids`` with padding, int64 ``[N]``, and the places that are none, bool ``[N]``."""
    ids = int_array(row.get("input_ids"))
    if ids is None or not len(ids):
        expected = f"a list of token ids below {vocab_size}"
        raise row_error(
            row,
            number,
            f"input_ids: expected {expected}, got {shown(row.get('input_ids'))}{json_hint(row.get('input_ids'))}",
        )
    attended = np.ones(len(ids), bool)
    if row.get("attention_mask") is not None:
        attended = _mask(row, number, "attention_mask", len(ids))
    return ids, attended


def _attended_ids(row: Row, number: int, ids: NDArray[np.int64], attended: NDArray[np.bool_], vocab_size: int) -> Ints:
    """Checked token ids without padding."""
    ids = ids[attended]
    if error := vocabulary_error(ids, vocab_size):
        raise row_error(row, number, f"input_ids: {error}")
    if not len(ids):
        raise row_error(row, number, "attention_mask: expected at least one 1, got padding alone")
    _check_positions(row, number, attended)
    return ids.astype(np.int32)


def request_ids(row: Row, number: int, vocab_size: int) -> Ints:
    """Token ids of a request, which end before the row's last run of targets.

    Raises:
        DataError: If the row is malformed.
    """
    ids, targets = tokenized_row(row, number, vocab_size)
    ends = np.flatnonzero(targets)
    if not len(ends):
        return ids
    before = np.flatnonzero(~targets[: ends[-1]])
    return ids[: before[-1] + 1 if len(before) else 0]


def _labelled(row: Row, number: int, ids: NDArray[np.int64], attended: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Places with a label, of which each must be the id at the same place."""
    labels = int_array(row["labels"])
    if labels is None or len(labels) != len(ids):
        got = shown(row["labels"]) + json_hint(row["labels"]) if labels is None else f"{len(labels)} labels"
        raise row_error(row, number, f"labels: expected one integer for each of the {len(ids)} input_ids, got {got}")
    mask = labels != IGNORED_LABEL
    if (wrong := np.flatnonzero(mask & (labels != ids))).size:
        at = int(wrong[0])
        msg = (
            "labels: expected -100 or the id at the same place (the shift to the next token is made here), got "
            f"{labels[at]} for {ids[at]} at {at}"
        )
        raise row_error(row, number, msg)
    if (wrong := np.flatnonzero(mask & ~attended)).size:
        at = int(wrong[0])
        raise row_error(row, number, f"labels: expected -100 where attention_mask is 0, got {labels[at]} at {at}")
    return mask


def _mask(row: Row, number: int, key: str, length: int) -> NDArray[np.bool_]:
    """A list of 0 and 1."""
    value: Any = row[key]
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        found = np.zeros(())
    if found.shape != (length,) or found.dtype.kind not in "iub" or not np.isin(found, (0, 1)).all():
        expected = f"{key}: expected a 0 or 1 for each of the {length} input_ids"
        raise row_error(row, number, f"{expected}, got {shown(value)}{json_hint(value)}")
    return found.astype(bool)


def _check_positions(row: Row, number: int, attended: NDArray[np.bool_]) -> None:
    """Raise `DataError` for ``position_ids`` of several sequences in one row, which would attend to each other here."""
    if row.get("position_ids") is None:
        return
    positions = int_array(row["position_ids"])
    own = None if positions is None or len(positions) != len(attended) else positions[attended]
    if own is None or (np.diff(own) != 1).any():
        expected = "positions that rise by 1 (one sequence in a row)"
        raise row_error(row, number, f"position_ids: expected {expected}, got {shown(row['position_ids'])}")
