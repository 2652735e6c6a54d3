"""The Rust core: tokenizer, linearizer, batch plans, scheduler, and decode attention on CPUs.

This module imports no torch. Arrays are numpy arrays, int32 unless the description says otherwise, in contiguous
memory. Another dtype is a `TypeError` and a strided view a `ConfigError`. Long calls release the GIL. Errors are those
of `prefixfast.errors`.

The tables of a plan are parts of one int32 buffer. A layout maps the name of a table to ``(offset, rows, cols)``, in
int32 entries from the buffer's start. A table with ``cols == 0`` has one dimension of ``rows`` entries. Offsets are
multiples of 16 entries (64 bytes), and the gaps hold zeros.

Shape letters: S sequences (one segment each), N packed tokens, U block uses, C distinct blocks in use, P prefixes,
F beam rows times prompt tokens, n decode rows, W work items. A block is the rows of one prefix.
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
    "attend_dense",
    "attend_join",
    "attend_packed",
    "attend_packed_backward",
    "attend_paths",
    "best_tokens",
    "digest",
    "gated_silu",
    "gated_silu_grad",
    "gelu",
    "gelu_grad",
    "layer_norm",
    "pack",
    "plan_packed",
    "rms_norm",
    "rms_norm_grad",
    "softmax_loss",
    "write_rows",
]

@final
class Tokenizer:
    """Tokenizer of a ``tokenizer.json``, which runs on a pool of threads.

    The pool has `PREFIXFAST_NUM_THREADS` threads, by default one per core. A forked child process makes its own pool.
    Fewer than 8 texts run on the caller's thread.

    Args:
        json: Content of a ``tokenizer.json``. Its truncation and padding settings are ignored.

    Raises:
        ConfigError: If the content is not a tokenizer.
    """

    def __new__(cls, json: str) -> Self: ...
    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included."""

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids of texts, as a ragged array.

        Args:
            texts: Texts, any number, which can be empty.
            add_special_tokens: Whether the tokenizer's template adds special tokens.

        Returns:
            ``ids`` int32 ``[N]`` and ``indptr`` int32 ``[n + 1]``. Text ``i`` is ``ids[indptr[i]:indptr[i + 1]]``.

        Raises:
            ConfigError: If `PREFIXFAST_NUM_THREADS` is not a positive number.
            DataError: If the tokenizer refuses a text.
            CapacityError: If there are more ids than int32 can count.
        """

    def decode_batch(
        self, ids: NDArray[np.int32], indptr: NDArray[np.int32], *, skip_special_tokens: bool
    ) -> list[str]:
        """Texts of a ragged array of token ids, the inverse of `encode_batch`.

        Args:
            ids: Token ids, int32 ``[N]``. Ids beyond the vocabulary give no text.
            indptr: Start of each text in ``ids``, int32 ``[n + 1]``, non-decreasing from 0 to N.
            skip_special_tokens: Whether to leave special tokens out.

        Returns:
            n texts.

        Raises:
            ConfigError: If ``indptr`` does not fit ``ids``, or `PREFIXFAST_NUM_THREADS` is not a positive number.
            DataError: If an id is negative.
        """

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None if the vocabulary does not have the token."""

    def id_to_token(self, id: int) -> str | None:
        """Token of an id, None if the vocabulary does not have the id."""

    def stream(self, *, skip_special_tokens: bool) -> DetokenizeStream:
        """A decoder of one growing sequence of ids.

        Args:
            skip_special_tokens: Whether to leave special tokens out.
        """

@final
class DetokenizeStream:
    """Decoder of one growing sequence of ids, made by `Tokenizer.stream`.

    The results of `push` and the result of `finish`, joined, are the text of all ids. A character whose bytes are
    spread over several ids is returned when all of its bytes are there.
    """

    def push(self, ids: Sequence[int]) -> str:
        """Append ids to the sequence.

        Args:
            ids: Next ids, any number.

        Returns:
            Text that later ids cannot change, often empty.

        Raises:
            DataError: If an id is negative or beyond int32.
        """

    def finish(self) -> str:
        """Rest of the text, after which the decoder starts a new sequence."""

@final
class Linearizer:
    """Converter of tables to text, made by `e2e`, `webnlg`, `dart`, `totto`, `template` or `from_spec`."""

    @staticmethod
    def e2e() -> Linearizer:
        """The prefix-tuning authors' format of E2E: ``name : Blue Spice | price : less than £ 20``."""

    @staticmethod
    def webnlg(*, leading_bar: bool = True, bare_first: bool = False) -> Linearizer:
        """The prefix-tuning authors' format of WebNLG: `` | s : p : o | s : p : o``.

        Args:
            leading_bar: Whether there is a bar before the first triple too, as the authors have it in training and in
                decoding.
            bare_first: Whether table 0 of a call has no bars at all, not even between triples, which is how the
                authors' decoding script writes the first entry of a file.
        """

    @staticmethod
    def dart(*, lower: bool = True) -> Linearizer:
        """The prefix-tuning authors' format of DART: ``s : p : o | s : p : o``.

        Args:
            lower: Whether relations are in Unicode's lower case, as the authors have them.
        """

    @staticmethod
    def totto() -> Linearizer:
        """The ToTTo authors' format of highlighted cells: ``<table> <cell> 1 </cell> </table>``.

        A table is pairs with the keys ``page_title``, ``section_title``, ``cell``, ``col_header`` and ``row_header``.
        The titles come first, and headers follow their cell.
        """

    @staticmethod
    def template(
        *, item: str = "{key} : {value}", separator: str = " | ", start: str = "", end: str = ""
    ) -> Linearizer:
        """A format for other tables: ``start``, the items joined by ``separator``, ``end``.

        Args:
            item: Text of one slot. ``{key}`` and ``{value}`` are required, ``{{`` and ``}}`` are braces.
            separator: Text between two items.
            start: Text before the first item.
            end: Text after the last item.

        Raises:
            ConfigError: If ``item`` has no ``{key}`` or no ``{value}``, another name, or a single brace.
        """

    @staticmethod
    def from_spec(spec: str) -> Linearizer:
        """The linearizer of a `spec`.

        Args:
            spec: JSON object with ``style`` and, optionally, the arguments of the style.

        Raises:
            ConfigError: If the text is not a JSON object, or has an unknown style, an unknown key or a value of the
                wrong type.
        """

    @property
    def spec(self) -> str:
        """JSON text with sorted keys, which `from_spec` reads."""

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
        """Texts of tables, one per table.

        Args:
            tables: Tables in the form of the style. `e2e` takes the official string
                (``name[Blue Spice], food[French]``), or a mapping or pairs of the official slots in any order, and
                writes the official order. `template` takes a mapping, or pairs in which keys can repeat. `webnlg` and
                `dart` take triples (subject, property, object), or mappings with exactly these keys. Other styles than
                `e2e` keep the order.

        Raises:
            DataError: If a table is empty, malformed or of another kind, a slot is unknown or occurs twice, or a value
                is empty (`e2e`) or not a string. The message names the row, from 0.
            UnicodeEncodeError: If a text holds half of a surrogate pair.
        """

@final
class Packing:
    """Result of `pack`. Each property returns the same array at every access."""

    @property
    def order(self) -> NDArray[np.int32]:
        """Numbers of the examples, micro-batch after micro-batch, int32 ``[n]``."""

    @property
    def micro_indptr(self) -> NDArray[np.int32]:
        """Start of each micro-batch in ``order``, int32 ``[m + 1]``."""

    @property
    def weight(self) -> NDArray[np.float64]:
        """Weight in the summed loss of each target token of an example, float64 ``[n]``, in the order of the input."""

def attend_dense(
    shape: tuple[int, int, int, int],
    lens: tuple[int, int],
    tensors: Sequence[tuple[int, int, tuple[int, int, int]]],
    is_bf16: bool,
    out: tuple[int, int],
    scale: float,
    causal: bool,
    threads: int,
    path: str | None,
) -> None:
    """Attention of T queries over S keys in each of B sequences, with HQ query heads, H kv heads and head dim D.

    The addresses are not checked. The only caller is `prefixfast.attention.cpu_dense`.

    Args:
        shape: B, HQ, H and D, with D at most 256.
        lens: T and S, not 0.
        tensors: Queries ``[B, HQ, T, D]``, keys and values ``[B, H, S, D]``, each as the address, the number of
            elements from there on, and the strides in elements of sequences, heads and rows.
        is_bf16: Whether the dtype of all tensors is bf16 instead of fp32.
        out: Addresses of the output ``[B, HQ, T, D]`` in that dtype and of the log-sum-exp ``[B, HQ, T]`` in fp32, both
            contiguous.
        scale: Factor of the scores.
        causal: Whether query i sees the first i + 1 keys instead of all.
        threads: Largest number of threads.
        path: Instruction set, one of `attend_paths`. None is that of the environment variable PREFIXFAST_SIMD, else the
            fastest.

    Raises:
        ConfigError: If sizes do not fit, or the CPU does not have the instruction set. Nothing is written.
    """

def attend_packed(
    heads: tuple[int, int, int],
    rows: tuple[int, int, int],
    tensors: Sequence[tuple[int, int, tuple[int, int, int]]],
    is_bf16: bool,
    tables: Sequence[tuple[int, int]],
    out: Sequence[tuple[int, int]],
    options: tuple[float, bool],
    threads: int,
    path: str | None,
) -> None:
    """Attention of sequences that follow each other, each over its prefix blocks and its own keys.

    The addresses are not checked. The only caller is `prefixfast.attention.cpu_packed`.

    Args:
        heads: HQ, H and D, with D at most 256.
        rows: N queries, M keys and R prefix rows.
        tensors: Queries ``[N, HQ, D]``, keys and values ``[M, H, D]``, prefix keys and values ``[R, H, D]``: address of
            the first element, number of elements up to the last one, and strides of sequences (0), heads and rows.
        is_bf16: Whether the dtype is bf16 instead of fp32.
        tables: Address and number of entries of ``seg``, ``use_indptr``, ``use`` and ``block`` of `PackedTables`.
        out: Address and number of elements of the output ``[N, HQ, D]``, of the inputs' dtype, and of the natural
            log-sum-exp ``[N, HQ]``, fp32.
        options: Factor of the scores, and whether the queries of a sequence are its last keys and see no later ones.
        threads: Largest number of threads.
        path: Instruction set, one of `attend_paths`. None is that of the environment variable PREFIXFAST_SIMD, else the
            fastest.

    Raises:
        ConfigError: If sizes or tables do not fit, or the CPU does not have the instruction set. Nothing is written.
    """

def attend_packed_backward(
    heads: tuple[int, int, int],
    rows: tuple[int, int, int],
    tensors: Sequence[tuple[int, int, tuple[int, int, int]]],
    is_bf16: bool,
    tables: Sequence[tuple[int, int]],
    result: tuple[Sequence[tuple[int, int, tuple[int, int, int]]], tuple[int, int]],
    own: Sequence[tuple[int, int]] | None,
    prefix: Sequence[tuple[int, int]],
    options: tuple[float, bool],
    threads: int,
    path: str | None,
) -> None:
    """Gradients of `attend_packed`.

    The addresses are not checked. The only caller is `prefixfast.attention.cpu_packed`.

    Args:
        heads: As in `attend_packed`.
        rows: As in `attend_packed`.
        tensors: As in `attend_packed`.
        is_bf16: Whether the dtype of these tensors, of ``own`` and of the first part of ``result`` is bf16.
        tables: As in `attend_packed`.
        result: Gradient of the output and output ``[N, HQ, D]``, as ``tensors``, and address and number of elements of
            the log-sum-exp.
        own: Address and number of elements of the gradients of queries ``[N, HQ, D]``, keys and values ``[M, H, D]``.
            None if they are not needed.
        prefix: Address and number of elements of the gradients of prefix keys and values ``[R, H, D]``, fp32, to which
            those of this call are added.
        options: As in `attend_packed`.
        threads: Largest number of threads.
        path: Instruction set, as in `attend_packed`.

    Raises:
        ConfigError: If sizes or tables do not fit, or the CPU does not have the instruction set. Nothing is written.
    """

def best_tokens(
    logits: tuple[int, int],
    is_bf16: bool,
    vocab: int,
    count: int,
    out: tuple[int, int, int],
    threads: int,
    path: str | None,
) -> None:
    """Most likely tokens of rows of logits ``[R, V]``, with their log-probabilities over all V tokens.

    The addresses are not checked. The only caller is `prefixfast.engine.best_tokens`.

    Args:
        logits: Address of the logits ``[R, V]`` and number of elements.
        is_bf16: Whether the logits are bf16 instead of fp32.
        vocab: V.
        count: Tokens of a row to find, 1 to V.
        out: Addresses of the log-probabilities ``[R, count]`` in fp32 and of the tokens ``[R, count]`` in int64, and
            number of elements of each. The most likely token of a row is the first, the smallest of equal ones.
        threads: Largest number of threads.
        path: Instruction set, one of `attend_paths`. None is that of the environment variable PREFIXFAST_SIMD, else the
            fastest.

    Raises:
        ConfigError: If sizes do not fit, or the CPU does not have the instruction set. Nothing is written.
    """

def gelu(
    x: int,
    out: int,
    size: int,
    is_bf16: bool,
    is_tanh: bool,
    threads: int,
    path: str | None,
) -> None:
    """GELU of each element.

    The addresses are not checked. The only caller is `prefixfast.model.cpu_layers`.

    Args:
        x: Address of the input.
        out: Address of the output, of the input's dtype.
        size: Number of elements of each.
        is_bf16: Whether the dtype is bf16 instead of fp32.
        is_tanh: Whether to compute the approximation with the hyperbolic tangent.
        threads: Largest number of threads.
        path: Instruction set, one of `attend_paths`. None is that of the environment variable PREFIXFAST_SIMD, else the
            fastest.

    Raises:
        ConfigError: If the CPU does not have the instruction set. Nothing is written.
    """

def gelu_grad(
    tensors: tuple[int, int, int],
    size: int,
    is_bf16: bool,
    is_tanh: bool,
    threads: int,
    path: str | None,
) -> None:
    """Gradient of GELU by its input.

    The addresses are not checked. The only caller is `prefixfast.model.cpu_layers`.

    Args:
        tensors: Addresses of the input, of the gradient by the output, and of the result, all of one dtype.
        size: Number of elements of each.
        is_bf16: Whether the dtype is bf16 instead of fp32.
        is_tanh: Whether GELU is the approximation with the hyperbolic tangent.
        threads: Largest number of threads.
        path: Instruction set, as in `gelu`.

    Raises:
        ConfigError: If the CPU does not have the instruction set. Nothing is written.
    """

def gated_silu(
    tensors: tuple[int, int, int],
    size: int,
    is_bf16: bool,
    threads: int,
    path: str | None,
) -> None:
    """SiLU of a gate times a second input.

    The addresses are not checked. The only caller is `prefixfast.model.cpu_layers`.

    Args:
        tensors: Addresses of the gate, of the second input and of the output, all of one dtype.
        size: Number of elements of each.
        is_bf16: Whether the dtype is bf16 instead of fp32.
        threads: Largest number of threads.
        path: Instruction set, as in `gelu`.

    Raises:
        ConfigError: If the CPU does not have the instruction set. Nothing is written.
    """

def gated_silu_grad(
    inputs: Sequence[int],
    outputs: Sequence[int],
    size: int,
    is_bf16: bool,
    threads: int,
    path: str | None,
) -> None:
    """Gradients of `gated_silu` by both inputs.

    The addresses are not checked. The only caller is `prefixfast.model.cpu_layers`.

    Args:
        inputs: Addresses of the gate, of the second input, and of the gradient by the output.
        outputs: Addresses of the gradients by the gate and by the second input.
        size: Number of elements of each.
        is_bf16: Whether the dtype of all is bf16 instead of fp32.
        threads: Largest number of threads.
        path: Instruction set, as in `gelu`.

    Raises:
        ConfigError: If the CPU does not have the instruction set. Nothing is written.
    """

def rms_norm(
    x: int,
    out: int,
    size: int,
    is_bf16: bool,
    weight: tuple[int, int, bool],
    eps: float,
    threads: int,
    path: str | None,
) -> None:
    """RMSNorm of the rows of a tensor.

    The addresses are not checked. The only caller is `prefixfast.model.cpu_layers`.

    Args:
        x: Address of the input ``[R, W]``.
        out: Address of the output, of the input's dtype.
        size: Number of elements of each.
        is_bf16: Whether their dtype is bf16 instead of fp32.
        weight: Address of the weight, W, and whether its dtype is bf16 instead of fp32.
        eps: Number that is added to the mean square.
        threads: Largest number of threads.
        path: Instruction set, as in `gelu`.

    Raises:
        ConfigError: If sizes or dtypes do not fit, or the CPU does not have the instruction set. Nothing is written.
    """

def rms_norm_grad(
    tensors: tuple[int, int, int],
    size: int,
    is_bf16: bool,
    weight: tuple[int, int, bool],
    eps: float,
    threads: int,
    path: str | None,
) -> None:
    """Gradient of `rms_norm` by its input.

    The addresses are not checked. The only caller is `prefixfast.model.cpu_layers`.

    Args:
        tensors: Addresses of the input, of the gradient by the output, and of the result, all of one dtype.
        size: Number of elements of each.
        is_bf16: Whether their dtype is bf16 instead of fp32.
        weight: As in `rms_norm`.
        eps: As in `rms_norm`.
        threads: Largest number of threads.
        path: Instruction set, as in `gelu`.

    Raises:
        ConfigError: If sizes or dtypes do not fit, or the CPU does not have the instruction set. Nothing is written.
    """

def softmax_loss(
    logits: int,
    size: int,
    is_bf16: bool,
    targets: int,
    losses: int,
    rows: int,
    is_grad: bool,
    threads: int,
    path: str | None,
) -> None:
    """Negative log-likelihood of the target of each row of logits, and its gradient in place of the logits.

    The addresses are not checked. The only caller is `prefixfast.attention.cpu_softmax_loss`.

    Args:
        logits: Address of the logits ``[R, V]``.
        size: Number of logits.
        is_bf16: Whether their dtype is bf16 instead of fp32.
        targets: Address of the targets, int64 ``[R]``.
        losses: Address of the losses, fp32 ``[R]``.
        rows: R.
        is_grad: Whether the gradient of each row's loss is written over its logits.
        threads: Largest number of threads.
        path: Instruction set, as in `gelu`.

    Raises:
        ConfigError: If a target is not below V, or the CPU does not have the instruction set. Nothing is written.
    """

def layer_norm(
    x: int,
    out: int,
    size: int,
    is_bf16: bool,
    parameters: tuple[int, int, int, bool],
    eps: float,
    threads: int,
    path: str | None,
) -> None:
    """LayerNorm of the rows of a tensor.

    The addresses are not checked. The only caller is `prefixfast.model.cpu_layers`.

    Args:
        x: Address of the input ``[R, W]``.
        out: Address of the output, of the input's dtype.
        size: Number of elements of each.
        is_bf16: Whether their dtype is bf16 instead of fp32.
        parameters: Address of the weight and of the bias, W, and whether their dtype is bf16 instead of fp32.
        eps: Number that is added to the variance.
        threads: Largest number of threads.
        path: Instruction set, as in `gelu`.

    Raises:
        ConfigError: If sizes or dtypes do not fit, or the CPU does not have the instruction set. Nothing is written.
    """

def digest(array: NDArray[np.uint8]) -> int:
    """Digest of 64 bits of an array, for finding changed weights.

    Arrays that differ in one word of 8 bytes have different digests. Other different arrays have equal digests with a
    probability of about 2**-64. The array is read on the pool of threads of `Tokenizer`, with the GIL held.

    Args:
        array: Bytes, in contiguous memory.
    """

def pack(
    lengths: NDArray[np.int32],
    targets: NDArray[np.int32],
    batch: NDArray[np.int32],
    *,
    token_budget: int,
    sequence_sum: bool,
) -> Packing:
    """Pack whole per-prefix batches into micro-batches of a token budget.

    Batches are placed first-fit decreasing, and micro-batches are in the order in which they were opened. A batch over
    the budget is split over several micro-batches of its own, in its own order. An example over the budget has a
    micro-batch of its own. Within a micro-batch, batches ascend and examples keep their order.

    Args:
        lengths: Number of tokens of each example, at least 1, int32 ``[n]``.
        targets: Number of target tokens of each example, from 0 to its length, int32 ``[n]``.
        batch: Number of each example's batch, int32 ``[n]``, non-decreasing. A batch is one optimizer step of one
            prefix.
        token_budget: Largest number of tokens of a micro-batch, at least 1.
        sequence_sum: Whether a target token weighs 1 / (examples of the batch) instead of 1 / (targets of the batch).

    Raises:
        ConfigError: If the arrays differ in length, a length is below 1, the targets are outside of 0 to the length,
            ``batch`` descends, or the budget is below 1.
        DataError: If a batch has no targets.
    """

@final
class PlanBuffer:
    """Result of `plan_packed`."""

    @property
    def buffer(self) -> NDArray[np.int32]:
        """Buffer of all tables, int32, contiguous. Every access returns the same object."""

    @property
    def sections(self) -> dict[str, tuple[int, int, int]]:
        """Layout of the buffer, ``(offset, rows, cols)`` by the name of the table. Every access returns a new dict."""

    @property
    def reach(self) -> int:
        """Largest number of keys that a query can see: the sequence's length plus the rows of its prefixes."""

def plan_packed(
    lengths: NDArray[np.int32],
    prefix_indptr: NDArray[np.int32],
    prefix: NDArray[np.int32],
    prefix_rows: NDArray[np.int32],
    *,
    tiles: tuple[int, int, int],
    buckets: int = 4,
    last_prompt_token: NDArray[np.int32] | None = None,
    key_lengths: NDArray[np.int32] | None = None,
    padded: bool = True,
) -> PlanBuffer:
    """Tables of one packed forward pass of sequences with N tokens in total.

    A sequence has one segment. A sequence with an infix has a second one, from its last prompt token on, and its first
    segment does not see the infix. The segments of a sequence start at the same key.

    Columns of the tables, with S segments:

    - ``seg[S, 4]``: first query row, number of rows, first key row, number of keys.
    - ``seg_pos[S]``: position of the first query relative to the segment's key 0.
    - ``use_indptr[S + 1]``, ``use[U, 3]``: block, position of the block's first row relative to key 0, slides. The
      blocks of a segment are in order from left to right and end right before key 0.
    - ``block[C, 2]``: first prefix row, number of rows. Blocks ascend by prefix number, and blocks that are unused or
      have no rows are left out.
    - ``user_indptr[C + 1]``, ``user[*]``: query rows that use a block, ascending.
    - ``user_pos[*]``, ``user_slides[*]``: position of the block's first row relative to that query's own position,
      slides.
    - ``span[C, 3]``: first user row, count, 1 if the users are consecutive rows, else 0.
    - ``bucket[B, 2]``: number of sequences, padded length; ascending by length. Empty without ``padded``, as are the
      next two.
    - ``gather[*]``: token index at each place of the padded layouts of all buckets. Padding repeats the last token of
      the sequence.
    - ``scatter[N]``: place of each token in the padded layouts.
    - ``position_ids[N]``: index of the token in its sequence plus the largest ``pos_start`` of the prefixes at place 0,
      from the last prompt token on also plus the largest ``pos_start`` of the others. A prefix at place 2 lets the
      tokens before the last prompt token end at position -1.
    - ``tiles[n, 2]``: segment, first query row.
    - ``key_tiles[n, 3]``: first segment, one past the last segment, first key relative to the segments' first key.
    - ``block_tiles[n, 2]``: block, first of its rows.

    Args:
        lengths: Number of tokens of each sequence, at least 1, int32 ``[sequences]``.
        prefix_indptr: Start of each sequence in ``prefix``, int32 ``[sequences + 1]``. A sequence has no, one or
            several prefixes.
        prefix: Numbers of the prefixes from left to right, int32 ``[U]``, which index rows of ``prefix_rows``.
        prefix_rows: First row in the prefix tensor, number of rows, pos_start, slides (0 or 1) and place of each
            prefix, int32 ``[P, 5]``. Place 0 is before the first token, 1 and 2 are before the last prompt token.
        tiles: Number of query rows, keys and prefix rows of a tile; 0 makes no tiles of the kind.
        buckets: Largest number of groups of similar length in the padded layout, at least 1. The groups minimize
            padding.
        last_prompt_token: Index of the last prompt token of each sequence, int32 ``[sequences]``. None is the first
            token of each.
        key_lengths: Number of keys of each sequence, at least 1, int32 ``[sequences]``, if the keys are not its tokens,
            as in cross-attention. The keys of a sequence follow those of the one before it. Its prefixes are at place
            0, and key 0 has the position of its first query. None is the tokens.
        padded: Whether to make the padded layouts.

    Raises:
        ConfigError: If an array does not fit its description, or there are more entries than int32 can count.
        UnknownPrefixError: If ``prefix_rows`` does not have a prefix number.
    """

@final
class StepHeader:
    """Header of a step, made by `Scheduler.plan_step`."""

    @property
    def loads(self) -> list[tuple[int, int]]:
        """Prefixes to load after the evictions, as ``(prefix, first arena row)``; `prefix_ready` ends each load."""

    @property
    def evictions(self) -> list[int]:
        """Prefixes whose arena rows this step freed."""

    @property
    def prefill_ids(self) -> list[int]:
        """Requests of the prefill tables, in the order of the segments."""

    @property
    def decode_ids(self) -> list[int]:
        """Requests of the decode tables, in the order of the rows; a request has one row per beam."""

    @property
    def cancelled(self) -> list[int]:
        """Requests that this step dropped since they were cancelled, ascending."""

    @property
    def expired(self) -> list[int]:
        """Requests that this step dropped since their deadline has passed, earliest deadline first."""

    @property
    def prefill(self) -> tuple[list[dict[str, tuple[int, int, int]]], list[int]] | None:
        """Layouts of the prefill tables in ``out``, one per view, and the view of each layer; None without a prefill.

        Layers that have the same prefixes of the step share a view. With ``pad_decode``, layers that have the same of
        all registered prefixes share a view. If every prefix has all layers, the second list is empty. Every access
        returns a new object.
        """

    @property
    def decode(self) -> tuple[list[dict[str, tuple[int, int, int]]], list[int]] | None:
        """Layouts of the decode tables in ``out``, one per view, and the view of each layer; None without a decode."""

    @property
    def encoder(self) -> tuple[list[dict[str, tuple[int, int, int]]], list[int]] | None:
        """Layouts of the encoder's tables in ``out``, one per view, and the view of each encoder layer.

        None without a prefill, and for a decoder-only base. Encoder layers of different folds are in different views.
        """

    @property
    def cross(self) -> tuple[list[dict[str, tuple[int, int, int]]], list[int]] | None:
        """Layouts of the tables of the prefill's cross-attention in ``out``, one per view, and the view of each layer.

        None without a prefill, and for a decoder-only base.
        """

    @property
    def decode_cross(self) -> tuple[list[dict[str, tuple[int, int, int]]], list[int]] | None:
        """Layouts of the tables of the decode's cross-attention in ``out``, one per view, and the view of each layer.

        None without a decode, and for a decoder-only base.
        """

    @property
    def encoder_reach(self) -> int:
        """Largest number of keys that a query of the encoder or of cross-attention can see, 0 without an encoder."""

    @property
    def prefill_reach(self) -> int:
        """Largest number of keys that a prefill query can see, 0 without a prefill."""

    @property
    def decode_reach(self) -> int:
        """Largest number of keys that a decode row can see, 0 without a decode."""

@final
class Scheduler:
    """Scheduler of one engine: queue of requests, decode rows, rows of the KV arena, and prefixes in the arena.

    A step is `plan_step`, the forward pass and `commit`. A request is admitted with all rows that it can need, so that
    no request is preempted. An admitted request is prefilled when its prefixes are in the arena, and decoded in every
    later step until `commit` ends it. The last 64 arena rows are never allocated, since kernels read past the end of a
    block. Row ``arena_rows - 1`` is the scratch slot of padding rows.

    Args:
        arena_rows: Number of rows of the arena, at least 80.
        max_rows: Number of decode rows.
        max_batched_tokens: Largest number of tokens of a step, in which each decode row counts one. At most three
            quarters of this number of rows are decoded. A longer prompt is filled over several steps, in chunks whose
            size does not depend on other requests.
        tile_rows: Number of query rows of a prefill tile; 0 makes no tiles.
        buckets: Largest number of groups of similar length in the padded layout, at least 1.
        prefix_rows: Largest number of arena rows of all prefixes together. None is no limit.
        decode: Numbers that cut decode steps into work items: ``users``, ``fill``, ``key_bytes``, ``part_bytes``,
            ``item_bytes`` and ``launch_bytes`` of `prefixfast_kernels.tile_selection.DecodeSizes`. None, or 0 users,
            makes no work tables.
        pad_decode: Whether to pad the decode tables, so that one captured CUDA graph serves every step of a bucket. The
            padded sizes depend on the next power of two of the rows (at most ``max_rows``) and on the largest number of
            prefixes of a request so far. Needs ``decode``. Padding rows have one key, in the scratch slot. Their
            ``row`` is ``max_rows``, so the slot table needs that row too.
        encoder_folds: Fold of each encoder layer of an encoder-decoder base, None for a decoder-only base. The prefix
            rows of encoder layer i lie in the tensors of one decoder layer, which several encoder layers share where
            the encoder is deeper. Those of fold f follow those of fold f - 1. Needs steps without ``pad_decode``.

    Raises:
        ConfigError: If a number is out of range.
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
        encoder_folds: Sequence[int] | None = None,
    ) -> Self: ...
    def register_prefix(
        self,
        prefix: int,
        rows: int,
        pos_start: int,
        slides: bool,
        *,
        place: int = 0,
        layers: list[bool] | None = None,
        sites: Sequence[tuple[int, int, list[bool] | None]] | None = None,
    ) -> None:
        """Register a prefix, which is loaded when a request needs it.

        Args:
            prefix: Number that the caller chooses for the prefix, at least 0 for an encoder-decoder base.
            rows: Number of arena rows, those of all sites together. A prefix of 0 rows is never loaded.
            pos_start: Position of the first token after the prefix.
            slides: Whether sliding windows hide rows of the prefix.
            place: Place of the prefix in a sequence, as in `plan_packed`.
            layers: Whether each layer has the prefix. None is all layers.
            sites: First row relative to the prefix's first arena row, number of rows in each layer, and whether each
                layer has them (None is all layers), for the decoder's self-attention, cross-attention and the encoder,
                in this order. First rows are multiples of 16, and the encoder has its rows once for each fold. None is
                ``rows`` rows of the decoder's self-attention.

        Raises:
            ConfigError: If the number is taken, a value is out of range, ``layers`` has another length than before, or
                ``sites`` overlap, exceed ``rows``, or are given for a decoder-only base.
        """

    def forget_prefix(self, prefix: int) -> None:
        """Remove a prefix and free its rows.

        Args:
            prefix: Number of the prefix.

        Raises:
            UnknownPrefixError: If the prefix is not registered.
            PrefixFastError: If a queued or running request uses the prefix, or the prefix is being loaded.
        """

    def keep_prefix(self, prefix: int, kept: bool) -> None:
        """Pin a prefix or release it; a pinned prefix is evicted only when no other one can be.

        Args:
            prefix: Number of the prefix.
            kept: Whether the prefix is pinned.

        Raises:
            UnknownPrefixError: If the prefix is not registered.
        """

    def load_prefix(self, prefix: int) -> tuple[int, list[int]] | None:
        """Allocate the arena rows of a prefix before a request needs them.

        Args:
            prefix: Number of the prefix.

        Returns:
            First arena row and the prefixes that were evicted. The caller copies the prefix to the rows and calls
            `prefix_ready`. None if the prefix has its rows already, has no rows, or no rows are free now.

        Raises:
            UnknownPrefixError: If the prefix is not registered.
        """

    def evict_prefix(self, prefix: int) -> int | None:
        """Free the arena rows of a prefix that no running request reads.

        Args:
            prefix: Number of the prefix.

        Returns:
            First arena row, None if the prefix is not in the arena or cannot be evicted now.

        Raises:
            UnknownPrefixError: If the prefix is not registered.
        """

    def prefix_state(self, prefix: int) -> tuple[int | None, int]:
        """First arena row of a prefix, and number of queued and running requests that use it.

        The row is None for a prefix that is neither in the arena nor being loaded.

        Args:
            prefix: Number of the prefix.

        Raises:
            UnknownPrefixError: If the prefix is not registered.
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
        """Add a request to the queue.

        Args:
            id: Number that no queued or running request has.
            prefixes: Numbers of the prefixes from left to right: none, one or several.
            prompt_len: Number of prompt tokens, at least 1. They are the decoder's.
            beams: Number of decode rows, at least 1.
            max_new: Largest number of decode steps, at least 1.
            encoder_len: Number of encoder tokens, at least 1 for an encoder-decoder base, else 0. The request holds as
                many arena rows for its keys and values of cross-attention. They are computed with the prompt in one
                step.
            tenant: Number of the tenant. Within a priority, the tenant that was served least is next, where a prompt
                token counts 1 and a generated token of a row 2. Within a tenant, the first request is next.
            priority: Priority of the request; requests with a higher number are first.
            deadline: Time at which `plan_step` drops the request, in seconds of the caller's clock. None is no
                deadline.

        Raises:
            RequestError: If a number is out of range, or the id is taken.
            CapacityError: If the request needs more rows than there are, or its encoder tokens and prompt do not fit
                one step.
            UnknownPrefixError: If a prefix is not registered.
        """

    def cancel(self, id: int) -> bool:
        """Drop a request at the next `plan_step`; returns False if it is unknown or cancelled already."""

    def prefix_ready(self, prefix: int) -> None:
        """End the load of a prefix, which is in the arena now, or has failed and its requests are cancelled.

        Args:
            prefix: Number of the prefix.

        Raises:
            UnknownPrefixError: If the prefix is not registered.
            PrefixFastError: If the prefix is not being loaded.
        """

    def plan_step(self, out: NDArray[np.int32], now: float = 0.0) -> StepHeader:
        """Plan the next step and write its tables.

        The prefill has the tables of `plan_packed`, where ``block`` rows are arena rows, and these:

        - ``chunk[S, 4]``: first decode row, beams, first prompt position, number of tokens.
        - ``slots[N]``: arena row of each token.
        - ``fill[F, 3]``: decode row, position and slot of every beam row and prompt token of the step.
        - ``logits_idx[*]``: last token of each sequence whose prompt ends in this step.
        - ``key_slots[*]``: arena rows of each prompt so far, which ``seg`` counts its keys in. The table is empty where
          every prompt starts in this step. Then the keys are the packed keys of this call.

        The decode of n rows has these tables:

        - ``row[n]``: decode row.
        - ``slot[n]``: arena row of the new token's key and value.
        - ``lens[n]``: number of keys, the new one included. The first decode step of a request has ``prompt_len + 1``.
        - ``position_ids[n]``: position of the new token.
        - ``use_indptr[n + 1]``, ``use[U, 3]``, ``block[C, 2]``, ``user_indptr[C + 1]``, ``user_slides[*]``,
          ``span[C, 3]``: as in `plan_packed`.
        - ``user[*]``: numbers 0 to n - 1 of the rows that use a block.
        - ``user_pos[*]``: position of the use minus ``lens - 1``.
        - ``work[W, 6]``, ``grouped[C]``, ``part_indptr[n + 1]``, ``part[*]``: work items of
          `prefixfast_kernels.tables.DecodeTables`. They are empty for a scheduler without ``decode``.

        An encoder-decoder base has more tables. Those of the encoder are those of `plan_packed` over the encoder tokens
        of the prefill's requests. Those of the prefill's cross-attention have the queries of the prefill, the encoder
        tokens as keys, and:

        - ``slots[M]``: arena row of each encoder token. The rows of a request are at most 4 runs, all but the last of
          which have a multiple of 64 rows.

        Those of the decode's cross-attention are ``row``, ``lens`` and the block and work tables of the decode.
        ``lens`` is 0, and the last blocks of a row are those of the encoder rows of its request, one for each run.

        Padded tables end in padding rows, in blocks without rows or users, and in work items without rows. The layout
        of the padded part of ``out`` depends only on its bucket and on the ``layers`` of registered prefixes.

        Args:
            out: Buffer of the tables, int32, writable and contiguous, at least `buffer_len` long. Parts outside of the
                tables are not written.
            now: Current time for deadlines, in seconds of the caller's clock.

        Raises:
            CapacityError: If ``out`` is too short; the scheduler is unchanged.
            ConfigError: If ``out`` is not contiguous or not writable.
            PrefixFastError: If the last step was not committed, or a request has used its ``max_new`` steps and was not
                finished; the scheduler is unchanged.
        """

    def commit(self, finished: Sequence[int]) -> None:
        """End the step: decoded requests advance by one token, and finished requests free their rows.

        Args:
            finished: Admitted requests that have ended, in any order.

        Raises:
            RequestError: If an id is not admitted or occurs twice; the scheduler is unchanged.
        """

    @property
    def buffer_len(self) -> int:
        """Number of int32 entries that `plan_step` needs now at most.

        The number grows with the longest prompt, the most beams and the most prefixes of a request so far, and with the
        number of different layer sets of registered prefixes.
        """

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""

    @property
    def num_running(self) -> int:
        """Number of admitted requests."""

    @property
    def free_rows(self) -> int:
        """Number of free arena rows; rows of prefixes in the arena are not free."""

def attend_paths() -> list[str]:
    """Names of this CPU's instruction sets that `attend_decode` can use, fastest first; the last is ``scalar``."""

def attend_join(library: str) -> str | None:
    """Make `attend_decode` use the threads of a loaded library's OpenMP runtime; later calls change nothing.

    Args:
        library: Path of a library that this process has loaded.

    Returns:
        None, or the reason why there are no such threads, in which case `attend_decode` runs on the caller's thread.
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
    bias: tuple[int, int, int] | None,
) -> None:
    """Attention of one decode step of R rows, HQ query heads, H kv heads and head dim D.

    The addresses are not checked. The only caller is `prefixfast.attention.cpu_decode`.

    Args:
        shape: R, HQ, H and D, with D at most 256.
        q: Address of ``[R, HQ, D]``, number of elements from there on, strides in elements of rows and of heads, and
            whether the dtype is bf16 instead of fp32.
        out: Addresses of ``o`` ``[R, HQ, D]`` in the dtype of ``q`` and of ``lse`` ``[R, HQ]`` in fp32, both
            contiguous.
        own: Addresses of the arena's keys and values ``[*, H, D]``, number of elements of each, and whether the dtype
            is bf16 instead of fp32.
        prefix: Addresses of the prefixes' keys and values ``[*, H, D]``, number of elements of each, and whether the
            dtype is bf16 instead of fp32. The prefixes can be in the arena.
        table: Address of the int32 slot table, number of rows, number of columns, stride of rows in elements.
        tables: Address and number of entries of the int32 tables ``block``, ``use_indptr``, ``use``, ``row`` and
            ``lens``.
        scale: Factor of the scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Soft cap of the scores, 0 for none.
        threads: Largest number of threads.
        path: Instruction set, one of `attend_paths`. None is that of the environment variable PREFIXFAST_SIMD, else the
            fastest.
        bias: Address of the position bias ``[HQ, 2 * maxd + 1]`` in fp32, number of elements, and maxd. None for none.

    Raises:
        ConfigError: If sizes do not fit, a table has a row that does not exist, a row has neither own keys nor blocks,
            there are both a bias and a soft cap, or the CPU does not have the instruction set. Nothing is written.
    """

def write_rows(
    arenas: tuple[int, int],
    rows: tuple[int, int],
    new: Sequence[tuple[int, int, int]],
    slots: tuple[int, int],
    threads: int,
) -> None:
    """Copy new keys and values to rows of the arena.

    The addresses are not checked. The only caller is `prefixfast.attention.cpu_write`.

    Args:
        arenas: Addresses of the arena's keys and values.
        rows: Number of rows of the arena, and bytes of a row.
        new: Address of the new keys, bytes up to the end of the last row, and bytes from row to row, and the same of
            the new values.
        slots: Address of the arena row of each new row, int32, and number of new rows. Of equal ones the last counts.
        threads: Largest number of threads.

    Raises:
        ConfigError: If a slot names no row of the arena. Nothing is written.
    """
