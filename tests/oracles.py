"""Slow counterparts of the Rust core in plain Python, and paths and data that tests share.

The functions are written from the definitions, not from the Rust code.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PREFIXFAST_SHARED", ROOT.parent / "shared"))

E2E_KEYS = {
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}


def int32(values: Sequence[int] | Sequence[Sequence[int]], cols: int = 0) -> np.ndarray:
    """An int32 array, two-dimensional if `cols` is given."""
    return np.array(values, dtype=np.int32).reshape((-1, cols) if cols else -1)


def e2e_rows() -> Iterator[str]:
    """Meaning representations of the E2E files in the shared data folder."""
    for path in sorted((SHARED / "data" / "e2e").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["mr"]


@functools.cache
def gpt2() -> Any:
    """GPT-2's tokenizer (of the library `tokenizers`) from the shared data folder; skips the test if missing."""
    folder = SHARED / "data" / "vocab" / "gpt2"
    if not folder.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not at {SHARED}")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return made


def e2e(table: str | Mapping[str, str]) -> str:
    """One E2E meaning representation as text, in the format of Li & Liang 2021."""
    slots = dict(re.findall(r"(?:^|, )([A-Za-z ]+)\[([^\]]*)\]", table)) if isinstance(table, str) else dict(table)
    if "priceRange" in slots:
        slots["priceRange"] = re.sub(r"£ *(\d+) *- *(\d+)", r"£\1 - \2", slots["priceRange"])
        slots["priceRange"] = re.sub(r"£ *", "£ ", slots["priceRange"])
    return " | ".join(f"{new} : {slots[old]}" for old, new in E2E_KEYS.items() if old in slots)


def template(table: Sequence[tuple[str, str]], item: str, separator: str, start: str, end: str) -> str:
    """A table as text by a template with the rules of `str.format`."""
    return start + separator.join(item.format(key=key, value=value) for key, value in table) + end


def pack(
    lengths: Sequence[int], targets: Sequence[int], batch: Sequence[int], budget: int, sequence_sum: bool
) -> tuple[list[list[int]], list[float]]:
    """Micro-batches as lists of example numbers, and the weight of each example."""
    members: dict[int, list[int]] = {}
    for example, number in enumerate(batch):
        members.setdefault(number, []).append(example)
    weight = [1 / (len(members[b]) if sequence_sum else sum(targets[e] for e in members[b])) for b in batch]
    total = {number: sum(lengths[e] for e in examples) for number, examples in members.items()}
    split: list[list[int]] = []
    bins: list[list[int]] = []
    for number in sorted(members, key=lambda number: (-total[number], number)):
        if total[number] > budget:
            part: list[int] = []
            for example in members[number]:
                if part and sum(lengths[e] for e in part) + lengths[example] > budget:
                    split.append(part)
                    part = []
                part.append(example)
            split.append(part)
            continue
        for found in bins:
            if sum(total[b] for b in found) + total[number] <= budget:
                found.append(number)
                break
        else:
            bins.append([number])
    return split + [[e for b in sorted(found) for e in members[b]] for found in bins], weight


def least_padding(lengths: Sequence[int], buckets: int) -> int:
    """Number of tokens, padding included, of the best split of the sorted lengths into at most `buckets` groups."""
    ordered = sorted(lengths)

    @functools.cache
    def best(end: int, groups: int) -> int:
        if end == 0:
            return 0
        if groups == 0:
            return 1 << 60
        return min(best(start, groups - 1) + (end - start) * ordered[end - 1] for start in range(end))

    return best(len(ordered), buckets)


def uses(rows: Sequence[tuple[int, int, Sequence[int]]], blocks: Mapping[int, tuple[int, int, int]]) -> dict[str, list]:
    """Tables of prefix blocks and the queries that see them.

    Args:
        rows: Query row, its position relative to key 0 and its prefixes from left to right, for each query row.
        blocks: First row, number of rows and window flag of each prefix, by prefix number.
    """
    shown = sorted({p for _, _, prefixes in rows for p in prefixes if blocks[p][1]})
    user: dict[int, list[tuple[int, int, int]]] = {p: [] for p in shown}
    for row, position, prefixes in rows:
        for place, p in enumerate(prefixes):
            if p in user:
                user[p].append((row, -sum(blocks[q][1] for q in prefixes[place:]) - position, blocks[p][2]))
    flat = [entry for p in shown for entry in user[p]]
    lists = [[row for row, _, _ in user[p]] for p in shown]
    return {
        "block": [list(blocks[p][:2]) for p in shown],
        "user_indptr": [sum(map(len, lists[:c])) for c in range(len(lists) + 1)],
        "user": [row for row, _, _ in flat],
        "user_pos": [position for _, position, _ in flat],
        "user_slides": [slides for _, _, slides in flat],
        "span": [[rows[0], len(rows), int(rows == list(range(rows[0], rows[0] + len(rows))))] for rows in lists],
    }


def segment_uses(segments: Sequence[Sequence[int]], blocks: Mapping[int, tuple[int, int, int]]) -> dict[str, list]:
    """Tables `use_indptr` and `use` of segments, each of which is a list of prefixes."""
    shown = sorted({p for prefixes in segments for p in prefixes if blocks[p][1]})
    use = [
        [
            [shown.index(p), -sum(blocks[q][1] for q in prefixes[place:]), blocks[p][2]]
            for place, p in enumerate(prefixes)
            if blocks[p][1]
        ]
        for prefixes in segments
    ]
    return {
        "use_indptr": [sum(map(len, use[:s])) for s in range(len(use) + 1)],
        "use": [entry for one in use for entry in one],
    }


def tile_starts(rows: int, height: int) -> range:
    """First row of each tile; no tiles if ``height`` is 0."""
    return range(0, rows if height else 0, height or 1)


def positions(places: Sequence[tuple[int, int]], split: int) -> tuple[int, int]:
    """Position of the first token of a sequence, and number of positions before its last prompt token, ``split``.

    Args:
        places: Place and pos_start of each prefix of the sequence.
        split: Index of the last prompt token.
    """
    gap = max((start for place, start in places if place), default=0)
    if any(place == 2 for place, _ in places):
        return -split, gap
    return max((start for place, start in places if not place), default=0), gap


def plan_packed(
    lengths: Sequence[int],
    prefixes: Sequence[Sequence[int]],
    prefix_rows: Sequence[Sequence[int]],
    tiles: Sequence[int],
    contexts: Sequence[int] | None = None,
    splits: Sequence[int] | None = None,
) -> dict[str, list]:
    """Tables of a packed forward, except those of the padded layout.

    Args:
        lengths: Number of tokens of each sequence.
        prefixes: Prefixes of each sequence from left to right.
        prefix_rows: First row, number of rows, pos_start, window flag and place of each prefix.
        tiles: Query tokens, keys and prefix rows of a tile.
        contexts: Number of tokens before those of each sequence; none by default.
        splits: Index of the last prompt token of each sequence; 0 by default.
    """
    before, splits = contexts or [0] * len(lengths), splits or [0] * len(lengths)
    totals = [n + c for n, c in zip(lengths, before, strict=True)]
    firsts = [sum(lengths[:s]) for s in range(len(lengths))]
    blocks = {number: (first, rows, slides) for number, (first, rows, _, slides, _) in enumerate(prefix_rows)}
    segments = []  # sequence, first query row, rows, position of the first query, prefixes
    for s, (first, n, c, used, split) in enumerate(zip(firsts, lengths, before, prefixes, splits, strict=True)):
        front = [p for p in used if not prefix_rows[p][4]]
        cut = min(max(split - c, 0), n) if any(prefix_rows[p][4] and prefix_rows[p][1] for p in used) else 0
        segments += [(s, first + a, b - a, c + a, own) for a, b, own in ((0, cut, front), (cut, n, used)) if b > a]
    queries = [(row + t, pos + t, used) for _, row, n, pos, used in segments for t in range(n)]
    starts = [
        positions([(prefix_rows[p][4], prefix_rows[p][2]) for p in used], split)
        for used, split in zip(prefixes, splits, strict=True)
    ]
    seen = [used for *_, used in segments]
    shown = sorted({p for used in seen for p in used if prefix_rows[p][1]})
    own = [[i for i, segment in enumerate(segments) if segment[0] == s] for s in range(len(lengths))]
    return {
        "seg": [[row, n, sum(totals[:s]), pos + n] for s, row, n, pos, _ in segments],
        "seg_pos": [pos for _, _, _, pos, _ in segments],
        **segment_uses(seen, blocks),
        **uses(queries, blocks),
        "position_ids": [
            start + t + (gap if t >= split else 0)
            for (start, gap), n, c, split in zip(starts, lengths, before, splits, strict=True)
            for t in range(c, c + n)
        ],
        "tiles": [[i, row + t] for i, (_, row, n, _, _) in enumerate(segments) for t in tile_starts(n, tiles[0])],
        "key_tiles": [
            [numbers[0], numbers[-1] + 1, key]
            for numbers, n in zip(own, lengths, strict=True)
            for key in tile_starts(n, tiles[1])
        ],
        "block_tiles": [[c, row] for c, p in enumerate(shown) for row in tile_starts(prefix_rows[p][1], tiles[2])],
    }


def tables(buffer: np.ndarray, sections: Mapping[str, tuple[int, int, int]]) -> dict[str, list]:
    """Tables of a buffer as lists, by name; asserts that they are aligned and disjoint."""
    end = 0
    found = {}
    for name, (offset, rows, cols) in sections.items():
        assert offset % 16 == 0
        assert offset >= end
        end = offset + rows * max(cols, 1)
        assert end <= len(buffer)
        found[name] = buffer[offset:end].reshape((rows, cols) if cols else (rows,)).tolist()
    return found
