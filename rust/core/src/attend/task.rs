//! Execution of one task: its queries over their prefix blocks, then over their own keys.

use std::cell::RefCell;
use std::ops::Range;

use super::chunk::{attend_chunk, attend_chunk_transposed};
use super::dispatch::{InstructionSet, Kind};
use super::key_copy::{ChunkOffsets, KvMemory, row_offsets};
use super::online_softmax::{CHUNK_KEYS, SoftmaxState};
use super::output::SharedOutput;
use super::plan::{Plan, QueryRow, Task};
use super::state::{BlockUser, Query, TaskShape, TaskState};
use super::transposed;
use super::vector::{Element, F32x16, Scalar, SimdOps};
use super::{DecodeInputs, Floats, KeysValues};

thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch { floats: Vec::new(), softmax: Vec::new(), queries: Vec::new(), users: Vec::new() })
    };
}

/// Memory of a thread, reused from call to call because fresh memory costs page faults.
struct Scratch {
    floats: Vec<f32>,
    softmax: Vec<SoftmaxState>,
    queries: Vec<Query>,
    users: Vec<BlockUser>,
}

/// Runs a task with the given instruction set.
pub(super) fn run(
    instructions: InstructionSet,
    inputs: &DecodeInputs<'_>,
    plan: &Plan,
    task: &Task,
    out: &SharedOutput<'_>,
) {
    SCRATCH.with_borrow_mut(|scratch| match instructions.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value in `Kind::Avx512` proves that the CPU has the enabled instructions.
        Kind::Avx512(simd, _) => unsafe { run_avx512(simd, inputs, plan, task, out, scratch) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value in `Kind::Avx2` proves that the CPU has the enabled instructions.
        Kind::Avx2(simd) => unsafe { run_avx2(simd, inputs, plan, task, out, scratch) },
        Kind::Scalar => run_generic(Scalar, inputs, plan, task, out, scratch),
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn run_avx512(
    simd: super::avx512::Avx512,
    inputs: &DecodeInputs<'_>,
    plan: &Plan,
    task: &Task,
    out: &SharedOutput<'_>,
    scratch: &mut Scratch,
) {
    run_generic(simd, inputs, plan, task, out, scratch);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(
    simd: super::avx2::Avx2,
    inputs: &DecodeInputs<'_>,
    plan: &Plan,
    task: &Task,
    out: &SharedOutput<'_>,
    scratch: &mut Scratch,
) {
    run_generic(simd, inputs, plan, task, out, scratch);
}

#[inline(always)]
fn run_generic<S: SimdOps>(
    simd: S,
    inputs: &DecodeInputs<'_>,
    plan: &Plan,
    task: &Task,
    out: &SharedOutput<'_>,
    scratch: &mut Scratch,
) {
    let shape = inputs.shape;
    let (rows, group_size) = (&plan.rows[task.rows.clone()], shape.heads / shape.kv_heads);
    let Scratch {
        floats,
        softmax,
        queries,
        users,
    } = scratch;
    let task_shape = TaskShape {
        rows: rows.len(),
        heads: task.heads.clone(),
        group_size,
        head_dim: shape.head_dim,
    };
    let mut state = TaskState::new(task_shape, (inputs.softcap, inputs.bias), floats, softmax, queries);
    let (vectors, first_head, num_heads) = (
        state.head_vectors,
        task.heads.start * group_size,
        task.heads.len() * group_size,
    );
    for (q, row) in state.q.chunks_exact_mut(vectors * num_heads).zip(rows) {
        load_queries(inputs, row.index, first_head, q, vectors);
    }
    users.clear();
    for (row, query_row) in rows.iter().enumerate() {
        let uses = &plan.uses[query_row.uses.clone()];
        users.extend(uses.iter().enumerate().map(|(place, u)| BlockUser {
            place,
            block: u.block,
            row,
            first: u.first,
            distance: u.distance,
        }));
    }
    users.sort_unstable();
    let stride = shape.kv_heads * shape.head_dim;
    match inputs.prefix {
        KeysValues::F32 { k, v } => {
            attend_blocks(simd, &mut state, KvMemory { keys: k, values: v }, stride, plan, users);
        }
        KeysValues::Bf16 { k, v } => {
            attend_blocks(simd, &mut state, KvMemory { keys: k, values: v }, stride, plan, users);
        }
    }
    match inputs.own {
        KeysValues::F32 { k, v } => {
            attend_own_keys(simd, &mut state, KvMemory { keys: k, values: v }, stride, plan, task);
        }
        KeysValues::Bf16 { k, v } => {
            attend_own_keys(simd, &mut state, KvMemory { keys: k, values: v }, stride, plan, task);
        }
    }
    for (i, o) in state.o.chunks_exact(vectors).enumerate() {
        out.write(
            rows[i / num_heads].index,
            first_head + i % num_heads,
            state.softmax[i],
            o,
        );
    }
}

/// Copies the queries of one row, multiplied by the softmax scale, from query head `first_head` on.
#[inline(always)]
fn load_queries(inputs: &DecodeInputs<'_>, row: usize, first_head: usize, to: &mut [F32x16], vectors: usize) {
    let head_dim = inputs.shape.head_dim;
    for (j, to) in to.chunks_exact_mut(vectors).enumerate() {
        let start = row * inputs.q_strides[0] + (first_head + j) * inputs.q_strides[1];
        let to = to.as_flattened_mut();
        match inputs.q {
            Floats::F32(q) => copy_scaled(&q[start..start + head_dim], inputs.scale, to),
            Floats::Bf16(q) => copy_scaled(&q[start..start + head_dim], inputs.scale, to),
        }
        to[head_dim..].fill(0.0);
    }
}

#[inline(always)]
fn copy_scaled<K: Element>(from: &[K], scale: f32, to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32() * scale;
    }
}

/// Attention of the task over its prefix blocks, chunk by chunk, each chunk by all rows that see it.
#[inline(always)]
fn attend_blocks<S: SimdOps, K: Element>(
    simd: S,
    state: &mut TaskState<'_>,
    memory: KvMemory<'_, K>,
    stride: usize,
    plan: &Plan,
    users: &[BlockUser],
) {
    for users in users.chunk_by(|a, b| (a.place, a.block) == (b.place, b.block)) {
        let block = plan.blocks[users[0].block];
        let first = |u: &BlockUser| u.first;
        let first_seen_by_any = users.iter().map(first).min().unwrap_or(0);
        let first_seen_by_all = users.iter().map(first).max().unwrap_or(0);
        let query_vectors = transposed::num_query_vectors(users.len(), state.group_size);
        let mut is_transposed = false;
        // Borders between chunks affect the rounding, so they are at the same rows whoever sees the block.
        let mut start = first_seen_by_any / CHUNK_KEYS * CHUNK_KEYS;
        let mut current = row_offsets(block.start + start, stride);
        while start < block.rows {
            let count = CHUNK_KEYS.min(block.rows - start);
            let next = row_offsets(block.start + start + count, stride);
            let next_count = CHUNK_KEYS.min(block.rows - start - count);
            let offsets = ChunkOffsets {
                current: &current[..count],
                next: &next[..next_count],
            };
            let pays_off = state.bias.is_none() && transposed::pays_off(users, state.group_size);
            if !is_transposed && start >= first_seen_by_all && pays_off {
                is_transposed = true;
                transposed::transpose(state, users);
            }
            if is_transposed {
                attend_chunk_transposed(simd, state, memory, offsets, query_vectors);
            } else {
                attend_chunk(simd, state, memory, offsets, start, users);
            }
            start += count;
            current = next;
        }
        if is_transposed {
            transposed::transpose_back(state, users);
        }
    }
}

/// Attention of each row of the task over its own keys in the arena.
#[inline(always)]
fn attend_own_keys<S: SimdOps, K: Element>(
    simd: S,
    state: &mut TaskState<'_>,
    memory: KvMemory<'_, K>,
    stride: usize,
    plan: &Plan,
    task: &Task,
) {
    let chunks = |(row, query_row): (usize, &QueryRow)| {
        let slots = query_row.slots.clone();
        slots.clone().step_by(CHUNK_KEYS).map(move |start| OwnChunk {
            row,
            slots: start..slots.end.min(start + CHUNK_KEYS),
            distance: 1_i64.saturating_sub_unsigned((slots.end - start) as u64), // the last key is the query's own
        })
    };
    let mut chunks = plan.rows[task.rows.clone()]
        .iter()
        .enumerate()
        .flat_map(chunks)
        .peekable();
    let mut next = [0; CHUNK_KEYS];
    if let Some(chunk) = chunks.peek() {
        slot_offsets(&plan.slots[chunk.slots.clone()], stride, &mut next);
    }
    while let Some(OwnChunk { row, slots, distance }) = chunks.next() {
        let current = next;
        let following = chunks.peek().map_or(&[][..], |chunk| &plan.slots[chunk.slots.clone()]);
        slot_offsets(following, stride, &mut next);
        let offsets = ChunkOffsets {
            current: &current[..slots.len()],
            next: &next[..following.len()],
        };
        let user = BlockUser {
            place: 0,
            block: 0,
            row,
            first: 0,
            distance,
        };
        attend_chunk(simd, state, memory, offsets, 0, &[user]);
    }
}

/// At most [`CHUNK_KEYS`] own keys of a row.
struct OwnChunk {
    /// Index of the row in the task.
    row: usize,
    /// Range in [`Plan::slots`].
    slots: Range<usize>,
    /// Position of the first key relative to the query.
    distance: i64,
}

/// Writes the offsets of own keys.
#[inline(always)]
fn slot_offsets(slots: &[usize], stride: usize, offsets: &mut [usize; CHUNK_KEYS]) {
    for (to, slot) in offsets.iter_mut().zip(slots) {
        *to = slot * stride;
    }
}
