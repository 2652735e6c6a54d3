"""The Rust core: tokens, strings, batch plans, the scheduler, and decode attention on CPUs.

Nothing here imports torch. Arrays are numpy, int32 unless said otherwise and read only through contiguous memory: another dtype is a `TypeError`, a
strided view a `ConfigError`. Whatever takes long releases the GIL. Errors are those of `prefixfast.errors`.

Tables lie in ONE int32 buffer. `sections` names them: `name -> (offset, rows, cols)` in int32 counted from the buffer's start; `cols == 0` is a 1-D table of
`rows` entries. Every offset is a multiple of 16 int32 (64 bytes), the gaps hold zeros.

Letters: S sequences (one segment each), N packed tokens, U block uses, C distinct blocks in use, P prefixes, F beam rows x prompt tokens, n decode rows,
W work items.
"""

from collections.abc import Mapping, Sequence
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DetokenizeStream",
    "Linearizer",
    "Packing",
    "PlanBuffer",
    "Scheduler",
    "StepHeader",
    "Tokenizer",
    "attend_decode",
    "attend_join",
    "attend_paths",
    "pack",
    "plan_packed",
]

@final
class Tokenizer:
    """A `tokenizer.json`, run on the core's own threads.

    The threads are those of this process (`PREFIXFAST_NUM_THREADS`, by default one a core): after a fork the child makes its own. Fewer than 8 texts run on
    the caller's thread.

    Args:
        json: The text of a `tokenizer.json`. Truncation and padding settings inside are switched off.

    Raises:
        ConfigError: The text is no tokenizer.
    """

    def __new__(cls, json: str) -> Self: ...
    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Texts to ragged ids.

        Args:
            texts: Any number of texts, empty ones too.
            add_special_tokens: Let the tokenizer's own template add its tokens.

        Returns:
            `ids` int32[N] and `indptr` int32[n+1]: text `i` is `ids[indptr[i]:indptr[i+1]]`.

        Raises:
            ConfigError: `PREFIXFAST_NUM_THREADS` is no positive number.
            DataError: The tokenizer refuses a text.
            CapacityError: More ids than int32 counts.
        """

    def decode_batch(
        self, ids: NDArray[np.int32], indptr: NDArray[np.int32], *, skip_special_tokens: bool
    ) -> list[str]:
        """Ragged ids to texts, the inverse of `encode_batch`.

        Args:
            ids: int32[N]. Ids beyond the vocabulary give no text.
            indptr: int32[n+1], from 0 to N, non-decreasing.
            skip_special_tokens: Leave special tokens out.

        Returns:
            n texts.

        Raises:
            ConfigError: `indptr` does not fit `ids`, or `PREFIXFAST_NUM_THREADS` is no positive number.
            DataError: An id is negative.
        """

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, `None` if there is none."""

    def id_to_token(self, id: int) -> str | None:
        """The token of an id, `None` if there is none."""

    def stream(self, *, skip_special_tokens: bool) -> DetokenizeStream:
        """A new stream that turns one sequence's ids into text as they come."""

@final
class DetokenizeStream:
    """Text of one growing sequence of ids; made by `Tokenizer.stream`.

    All results of `push` and that of `finish`, joined, are the text of all ids: a character whose bytes are spread over ids comes when it is whole.
    """

    def push(self, ids: Sequence[int]) -> str:
        """Adds ids.

        Args:
            ids: The next ids, any number.

        Returns:
            The text that is certain now, often empty.

        Raises:
            DataError: An id is negative or beyond int32.
        """

    def finish(self) -> str:
        """The rest of the text: what `push` held back. The stream then starts over."""

@final
class Linearizer:
    """Tables to text, to the bit; made by `e2e`, `webnlg`, `dart`, `template` or `from_spec`."""

    @staticmethod
    def e2e() -> Linearizer:
        """The prefix-tuning authors' form of E2E: `name : Blue Spice | Type : coffee shop | price : less than £ 20`."""

    @staticmethod
    def webnlg(*, leading_bar: bool = True, bare_first: bool = False) -> Linearizer:
        """The prefix-tuning authors' form of WebNLG: ` | s : p : o | s : p : o`.

        Args:
            leading_bar: A bar before the first triple as well, as the authors have it in training and in decoding.
            bare_first: Table 0 of a call has no bar at all, not even between its triples: so the authors' decoding script writes entry 0 of a file.
        """

    @staticmethod
    def dart(*, lower: bool = True) -> Linearizer:
        """The prefix-tuning authors' form of DART: `s : p : o | s : p : o`.

        Args:
            lower: Write the relation in lower case (Unicode's), as the authors do.
        """

    @staticmethod
    def template(
        *, item: str = "{key} : {value}", separator: str = " | ", start: str = "", end: str = ""
    ) -> Linearizer:
        """One's own tables: `start`, the items joined by `separator`, `end`.

        Args:
            item: Text of one slot; `{key}` and `{value}` are required, `{{` and `}}` are braces.
            separator: Between two items, taken as it is.
            start: Before the first item, taken as it is.
            end: After the last item, taken as it is.

        Raises:
            ConfigError: `item` has no `{key}` or no `{value}`, another name, or a lone brace.
        """

    @staticmethod
    def from_spec(spec: str) -> Linearizer:
        """The linearizer that a `spec` describes; fields other than `style` may be left out.

        Raises:
            ConfigError: No JSON object, an unknown style, an unknown key, or a value of the wrong type.
        """

    @property
    def spec(self) -> str:
        """JSON text that `from_spec` reads back, keys sorted."""

    def linearize(
        self,
        tables: Sequence[
            str
            | Mapping[str, str]
            | Sequence[tuple[str, str]]
            | Sequence[tuple[str, str, str]]
            | Sequence[Mapping[str, str]]
        ],
    ) -> list[str]:
        """One text a table.

        Args:
            tables: For `e2e` the official string (`name[Blue Spice], food[French]`), a mapping or pairs of the official slots, in any order; for `template`
                a mapping, or pairs in which a key may come again; for `webnlg` and `dart` triples (subject, property, object), or mappings with exactly these
                keys. Order is kept, but in `e2e` it is the official one.

        Raises:
            DataError: A table is empty or malformed or of another kind, a slot unknown or given twice, a value empty (`e2e`) or not a string; names the row,
                counted from 0.
            UnicodeEncodeError: A text holds half a surrogate pair.
        """

@final
class Packing:
    """What `pack` returns. The arrays are made once and the same each time."""

    @property
    def order(self) -> NDArray[np.int32]:
        """int32[n]: numbers of the input examples, micro-batch after micro-batch."""

    @property
    def micro_indptr(self) -> NDArray[np.int32]:
        """int32[m+1]: micro-batch `j` is `order[micro_indptr[j]:micro_indptr[j+1]]`."""

    @property
    def weight(self) -> NDArray[np.float64]:
        """float64[n], by INPUT example: the weight of each of its target tokens in the summed loss."""

def pack(
    lengths: NDArray[np.int32],
    targets: NDArray[np.int32],
    batch: NDArray[np.int32],
    *,
    token_budget: int,
    sequence_sum: bool,
) -> Packing:
    """Puts whole per-prefix batches into micro-batches of a token budget.

    First-fit decreasing over batches; micro-batches in the order in which they were opened. A batch over the budget is split, alone, over several
    micro-batches in its own order; an example over the budget goes alone. Within a micro-batch batches ascend and examples keep their order.

    Args:
        lengths: int32[n], tokens of each example, at least 1.
        targets: int32[n], target tokens of each example, from 0 to its length.
        batch: int32[n], non-decreasing: equal numbers form one optimizer step of one prefix.
        token_budget: Most tokens in a micro-batch, at least 1.
        sequence_sum: A target token weighs 1/(examples of the batch) instead of 1/(targets of the batch).

    Raises:
        ConfigError: Arrays of different lengths, a length below 1, targets outside 0..length, descending `batch`, a budget below 1.
        DataError: A batch without targets.
    """

@final
class PlanBuffer:
    """What `plan_packed` returns."""

    @property
    def buffer(self) -> NDArray[np.int32]:
        """int32[*], contiguous, the same object each time."""

    @property
    def sections(self) -> dict[str, tuple[int, int, int]]:
        """Table name to (offset, rows, cols), see the module; a fresh dictionary each time."""

    @property
    def reach(self) -> int:
        """The most keys one query can see: largest length plus rows of its prefixes."""

def plan_packed(
    lengths: NDArray[np.int32],
    prefix_indptr: NDArray[np.int32],
    prefix: NDArray[np.int32],
    prefix_rows: NDArray[np.int32],
    *,
    tiles: tuple[int, int, int],
    buckets: int = 4,
) -> PlanBuffer:
    """Tables of one packed forward of S sequences, N tokens in all.

    Sections: `seg[S,4]` first query row, rows, first key row, keys; `seg_pos[S]` position of the first query relative to the segment's key 0, here 0;
    `use_indptr[S+1]`, `use[U,3]` block, position of the block's first row relative to key 0, slides: the blocks of a sequence lie left to right and end
    right before key 0; `block[C,2]` first prefix row, rows, ascending by prefix number, only blocks that are used and have rows; `user_indptr[C+1]`,
    `user[*]` the query rows that use a block, ascending, `user_pos[*]` the block's first row relative to that query's own position, `user_slides[*]`;
    `span[C,3]` first user row, count, 1 if the users are consecutive rows else 0; `bucket[B,2]` sequences, padded length, ascending by length; `gather[*]`
    the token index at each place of the padded layouts of all buckets (padding repeats the sequence's last token); `scatter[N]` the place of each token
    there; `position_ids[N]` token position plus the largest `pos_start` of the sequence's prefixes; `tiles[n,2]` segment, first query row;
    `key_tiles[n,3]` segment, the next segment, first key relative to its first; `block_tiles[n,2]` block, first of its rows.

    Args:
        lengths: int32[S], at least 1 each.
        prefix_indptr: int32[S+1], sequence `s` uses `prefix[prefix_indptr[s]:prefix_indptr[s+1]]`, left to right: none, one or several.
        prefix: int32[U], prefix numbers, rows of `prefix_rows`.
        prefix_rows: int32[P,4]: first row in the prefix tensor, number of rows, pos_start, slides 0|1.
        tiles: Query rows, keys and prefix rows of a tile; 0 makes none of the kind.
        buckets: Most groups of similar length for the padded layout, cut so that padding is least; at least 1.

    Raises:
        ConfigError: An array that does not fit its description, or more entries than int32 counts.
        UnknownPrefixError: A prefix number that `prefix_rows` does not have.
    """

@final
class StepHeader:
    """One step of `Scheduler.plan_step`."""

    @property
    def loads(self) -> list[tuple[int, int]]:
        """(prefix, first arena row): copy these prefixes in after the evictions, then call `prefix_ready`."""

    @property
    def evictions(self) -> list[int]:
        """Prefixes whose arena rows were given up."""

    @property
    def prefill_ids(self) -> list[int]:
        """Requests of the prefill tables, in segment order."""

    @property
    def decode_ids(self) -> list[int]:
        """Requests of the decode tables, in row order; each has as many rows as beams."""

    @property
    def cancelled(self) -> list[int]:
        """Requests that this step dropped because they were cancelled, ascending."""

    @property
    def expired(self) -> list[int]:
        """Requests that this step dropped because their deadline has passed, earliest first."""

    @property
    def prefill(self) -> tuple[list[dict[str, tuple[int, int, int]]], list[int]] | None:
        """Where the tables of the prefill lie in `out`, by view, and each layer's view; `None` without one. Made anew each time.

        Layers in which the same prefixes of the step lie (padded: of all that are registered) are one view; if each lies in all, the second list is empty.
        """

    @property
    def decode(self) -> tuple[list[dict[str, tuple[int, int, int]]], list[int]] | None:
        """Tables of the decode, as `prefill`."""

    @property
    def prefill_reach(self) -> int:
        """The most keys a prefill query can see, 0 without a prefill."""

    @property
    def decode_reach(self) -> int:
        """The most keys a decode row can see, 0 without a decode."""

@final
class Scheduler:
    """Owns queue, decode rows, arena rows and prefix pins of one engine.

    A step is `plan_step`, the forward, `commit`. A request is admitted with everything it will ever need, so nothing is preempted; it is prefilled once its
    prefixes are ready and decoded in every later step until `commit` says that it has ended. The last 64 arena rows are never handed out (kernels read past
    a block's tail); row `arena_rows - 1` is the scratch slot for padding rows.

    Args:
        arena_rows: Rows of the arena, at least 80.
        max_rows: Decode rows.
        max_batched_tokens: Most tokens of a step, decode rows included, but at least 64 prompt tokens; a prompt that does not fit is filled over several steps.
        tile_rows: Height of the prefill's tiles; 0 makes none.
        buckets: As in `plan_packed`.
        prefix_rows: Rows that prefixes may hold together; None: all.
        decode: How decode steps are cut: `users`, `fill`, `key_bytes`, `part_bytes`, `item_bytes`, `launch_bytes` of
            `prefixfast_kernels.tile_configs.DecodeSizes`; with 0 users, or None, no work tables.
        pad_decode: Fill the decode tables up to sizes that depend only on the next power of two of its rows (at most `max_rows`) and on the most prefixes of
            a request so far, so that a captured graph serves every step of its bucket. Needs `decode`. Dead rows have one key, in the scratch slot; their
            `row` is `max_rows`: the slot table needs that row too.

    Raises:
        ConfigError: A number out of range.
    """

    def __new__(
        cls,
        arena_rows: int,
        max_rows: int,
        max_batched_tokens: int,
        *,
        tile_rows: int = 0,
        buckets: int = 4,
        prefix_rows: int | None = None,
        decode: Sequence[int] | None = None,
        pad_decode: bool = False,
    ) -> Self: ...
    def register_prefix(
        self, prefix: int, rows: int, pos_start: int, slides: bool, *, layers: list[bool] | None = None
    ) -> None:
        """Makes a prefix known. Its rows are loaded when a request needs them.

        Args:
            prefix: Any number of the caller's.
            rows: Its rows, 0 is allowed (then it is never loaded).
            pos_start: Position of the first token after it.
            slides: The attention window slides over it.
            layers: By layer, whether it lies there; None: in all.

        Raises:
            ConfigError: The number is taken, a value is out of range, or `layers` has another length than before.
        """

    def forget_prefix(self, prefix: int) -> None:
        """Forgets a prefix and frees its rows.

        Raises:
            UnknownPrefixError: It is not registered.
            PrefixFastError: A queued or running request uses it, or it is being loaded.
        """

    def keep_prefix(self, prefix: int, kept: bool) -> None:
        """Evicts a prefix only when nothing else is left to evict, or as any other again.

        Raises:
            UnknownPrefixError: It is not registered.
        """

    def load_prefix(self, prefix: int) -> tuple[int, list[int]] | None:
        """Gives a prefix room before a request needs it.

        Returns:
            Its first arena row (copy it in, then call `prefix_ready`) and the prefixes that had to go; None if it has room already, needs none, or there is
            none now.

        Raises:
            UnknownPrefixError: It is not registered.
        """

    def evict_prefix(self, prefix: int) -> int | None:
        """Gives up the arena rows of a prefix that no running request reads.

        Returns:
            Its first arena row; None if it is not there or not free to go.

        Raises:
            UnknownPrefixError: It is not registered.
        """

    def prefix_state(self, prefix: int) -> tuple[int | None, int]:
        """The first arena row of a prefix that is there or on its way, and how many queued and running requests use it.

        Raises:
            UnknownPrefixError: It is not registered.
        """

    def add(
        self,
        id: int,
        prefixes: Sequence[int],
        prompt_len: int,
        beams: int,
        max_new: int,
        *,
        encoder_len: int = 0,
        tenant: int = 0,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Queues a request.

        Args:
            id: Any number that no queued or running request has.
            prefixes: Its prefixes from left to right: none, one or several.
            prompt_len: Prompt tokens, at least 1.
            beams: Decode rows, at least 1.
            max_new: Most decode steps, at least 1.
            encoder_len: Not supported yet, must be 0.
            tenant: Who asks. Within a priority the tenant that was served least goes first (a prompt token counts 1, a generated token of a row 2); within
                a tenant the first to arrive.
            priority: Higher goes first.
            deadline: Dropped once `plan_step` is told this time or a later one, in seconds of the caller's clock.

        Raises:
            RequestError: A number out of range, a known id, something not supported, or more rows than there will ever be.
            UnknownPrefixError: A prefix that is not registered.
        """

    def cancel(self, id: int) -> bool:
        """Drops a request at the next `plan_step`. False if it is not known or already cancelled."""

    def prefix_ready(self, prefix: int) -> None:
        """A load of `StepHeader.loads` is complete (or has failed and its requests are cancelled).

        Raises:
            UnknownPrefixError: It is not registered.
            PrefixFastError: It is not being loaded.
        """

    def plan_step(self, out: NDArray[np.int32], now: float = 0.0) -> StepHeader:
        """Plans the next step and writes its tables.

        Prefill sections: all of `plan_packed` (`block` rows are arena rows) and `chunk[S,4]` first decode row, beams, first prompt position, tokens;
        `slots[N]` the arena row of each token; `fill[F,3]` decode row, position, slot for every beam row and prompt token of the step; `logits_idx[*]`
        the last token of each sequence whose prompt ends in this step. `key_slots` is empty where every prompt starts in this step: then keys are the
        packed keys of this call; else `seg` counts keys in it and it holds the arena rows of each prompt so far.

        Decode sections, n rows: `row[n]`; `slot[n]` where the new token's key and value go; `lens[n]` keys with the new one; `position_ids[n]`
        `lens - 1 + pos_start`; `use_indptr[n+1]`, `use[U,3]`, `block[C,2]`, `user_indptr[C+1]`, `user[*]` (0 to n-1), `user_pos[*]` (use position minus
        `lens - 1`), `user_slides[*]`, `span[C,3]`; `work[W,6]`, `grouped[C]`, `part_indptr[n+1]`, `part[*]`, see `prefixfast_kernels.tables.DecodeTables`,
        empty unless the scheduler was made with `decode`. Padded tables end in dead rows, blocks without rows or users, and work without rows; their part
        of `out`, from the first section to the end of the last, has a layout that only its bucket and the `layers` of registered prefixes decide.
        The first decode step of a request has `lens == prompt_len + 1`.

        Args:
            out: int32[*], writable and contiguous, at least `buffer_len` long. Only the sections of the header are written.
            now: For deadlines, in seconds of the caller's clock.

        Raises:
            CapacityError: `out` is too short; nothing has changed.
            ConfigError: `out` is not contiguous or not writable.
            PrefixFastError: The last step was not committed, or a request has used its `max_new` steps and was not finished; nothing has changed.
        """

    def commit(self, finished: Sequence[int]) -> None:
        """Ends the step: the decoded requests advance, the finished ones free everything.

        Args:
            finished: Admitted requests that have ended, in any order.

        Raises:
            RequestError: An id that is not admitted, or one given twice; nothing has changed.
        """

    @property
    def buffer_len(self) -> int:
        """int32 entries that suffice for `plan_step` now.

        It grows with the longest prompt, most beams and most prefixes of a request so far, times the kinds of layers that registered prefixes tell apart.
        """

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""

    @property
    def num_running(self) -> int:
        """Admitted requests."""

    @property
    def free_rows(self) -> int:
        """Arena rows that nothing holds, resident prefixes count as held."""

def attend_paths() -> list[str]:
    """Names of the instruction sets of this CPU that `attend_decode` can use, the best first; `scalar` is always the last."""

def attend_join(library: str) -> str | None:
    """Lets `attend_decode` run on the threads of the OpenMP runtime that a loaded library uses. The first call decides.

    Args:
        library: Path of a library that this process has loaded.

    Returns:
        None, or why there are no such threads (then all calls run on their own thread).
    """

def attend_decode(
    shape: tuple[int, int, int, int],
    q: tuple[int, int, int, int, bool],
    out: tuple[int, int],
    own: tuple[int, int, int, bool],
    prefix: tuple[int, int, int, bool],
    table: tuple[int, int, int, int],
    tables: Sequence[tuple[int, int]],
    scale: float,
    window: int,
    softcap: float,
    threads: int,
    path: str | None,
) -> None:
    """Attention of one decode step of R rows, HQ query heads, H kv heads, D head dim. For `attend.py` only: nothing checks the addresses.

    Args:
        shape: R, HQ, H, D; D at most 256.
        q: Address of `[R, HQ, D]`, elements from there on, elements from one row and from one head to the next, bf16 (else fp32).
        out: Addresses of `o` `[R, HQ, D]` in the dtype of `q`, and of fp32 `lse` `[R, HQ]`; both contiguous.
        own: Addresses of the arena's keys and values `[*, H, D]`, elements of each, bf16 (else fp32).
        prefix: The same for prefix rows; may be the arena.
        table: Address of the int32 slot table, rows, columns, entries from one row to the next.
        tables: Address and number of entries of the int32 tables `block`, `user_indptr`, `user`, `user_pos`, `user_slides`, `row`, `lens`.
        scale: Multiplies scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Score cap, 0 for none.
        threads: Most threads.
        path: One of `attend_paths`, None: what `PREFIXFAST_SIMD` names, else the best.

    Raises:
        ConfigError: Sizes that do not fit, a table that names a row that does not exist, a row without keys, instructions that the CPU does not have;
            nothing is written.
    """
