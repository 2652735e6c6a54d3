//! Copies of a chunk's keys and values in fp32, and prefetches of keys that are used soon.

use std::ops::Range;

use super::memory::SharedMemory;
use super::online_softmax::CHUNK_KEYS;
use super::state::{CACHE_LINE, TaskState};
use super::vector::{Element, LANES, SimdOps};

/// Number of keys by which the prefetch runs ahead of the copy.
const PREFETCH_DISTANCE: usize = 12;

/// Keys and values `[rows, H, D]` in memory.
#[derive(Clone, Copy)]
pub(super) struct KvMemory<'a, K> {
    pub(super) keys: SharedMemory<'a, K>,
    pub(super) values: SharedMemory<'a, K>,
}

/// Offsets of the rows of a chunk and of the chunk that follows, in elements.
///
/// The rows are those of a [`Plan`](super::plan::Plan), so the tables of the call name them.
#[derive(Clone, Copy)]
pub(super) struct ChunkOffsets<'a> {
    pub(super) current: &'a [usize],
    pub(super) next: &'a [usize],
}

/// Offsets of `CHUNK_KEYS` consecutive rows, starting at row `first`.
#[inline(always)]
pub(super) fn row_offsets(first: usize, stride: usize) -> [usize; CHUNK_KEYS] {
    std::array::from_fn(|j| (first + j) * stride)
}

/// Copies the keys and the values of a chunk into the task's state.
#[inline(always)]
pub(super) fn copy_chunk<S: SimdOps, K: Element>(
    simd: S,
    state: &mut TaskState<'_>,
    memory: KvMemory<'_, K>,
    offsets: &[usize],
) {
    for (to, from) in state.copies.iter_mut().zip([memory.keys, memory.values]) {
        copy_heads(simd, from, offsets, (&state.heads, state.head_dim), to);
    }
}

/// Copies some heads of the rows at `offsets` to fp32, `[heads, CHUNK_KEYS, head dim]`. Each row is padded with zeros.
#[inline(always)]
fn copy_heads<S: SimdOps, K: Element>(
    simd: S,
    from: SharedMemory<'_, K>,
    offsets: &[usize],
    (heads, head_dim): (&Range<usize>, usize),
    to: &mut [f32],
) {
    let width = head_dim.next_multiple_of(LANES);
    for (j, start) in offsets.iter().enumerate() {
        for (h, head) in heads.clone().enumerate() {
            if let Some(soon) = offsets.get(j + PREFETCH_DISTANCE) {
                prefetch_lines(simd, from, soon + head * head_dim, head_dim);
            }
            // SAFETY: the offset is that of a row of the plan (`ChunkOffsets`), and the head lies in the row.
            let row = unsafe { from.get(start + head * head_dim, head_dim) };
            let (from, rest) = row.as_chunks::<LANES>();
            let to = &mut to[(h * CHUNK_KEYS + j) * width..][..width];
            let (to, tail) = to.split_at_mut(head_dim - rest.len());
            for (from, to) in from.iter().zip(to.as_chunks_mut().0) {
                simd.store(K::load(simd, from), to);
            }
            tail.fill(0.0);
            for (from, to) in rest.iter().zip(tail) {
                *to = from.to_f32();
            }
        }
    }
}

/// Prefetches part `part` of `parts` of the next chunk, so that it arrives while the current chunk is used.
#[inline(always)]
pub(super) fn prefetch_part<S: SimdOps, K: Element>(
    simd: S,
    state: &TaskState<'_>,
    memory: KvMemory<'_, K>,
    next: &[usize],
    part: usize,
    parts: usize,
) {
    let heads = state.heads.start * state.head_dim..state.heads.end * state.head_dim;
    for start in &next[part * next.len() / parts..(part + 1) * next.len() / parts] {
        for memory in [memory.keys, memory.values] {
            prefetch_lines(simd, memory, start + heads.start, heads.len());
        }
    }
}

/// Prefetches the cache lines of `count` elements from element `first` on.
#[inline(always)]
fn prefetch_lines<S: SimdOps, K: Element>(simd: S, memory: SharedMemory<'_, K>, first: usize, count: usize) {
    for element in (0..count).step_by(CACHE_LINE / size_of::<K>()) {
        simd.prefetch(memory.address(first + element));
    }
}
