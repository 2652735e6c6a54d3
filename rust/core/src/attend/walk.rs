//! One task: its queries over their blocks, then over their own keys.

use std::cell::RefCell;
use std::marker::PhantomData;

use super::lanes::{Element, Lanes, Line, Scalar, WIDTH};
use super::plan::{Plan, Task};
use super::query::{CHUNK, Chunk, Running, gather, score, weigh};
use super::simd::{Kind, Simd};
use super::{Floats, FloatsMut, Output, Problem, Shape, Source};

/// From this many rows on a chunk is first copied, as fp32 and head by head.
const PACK_FROM: usize = 2;
const CACHE_LINE: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { floats: Vec::new(), running: Vec::new(), users: Vec::new() }) };
}

/// A thread's memory, kept from call to call: fresh memory would cost page faults.
struct Scratch {
    floats: Vec<f32>,
    running: Vec<Running>,
    users: Vec<User>,
}

/// A row of the task that sees a block from its row `first` on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct User {
    block: usize,
    row: usize,
    first: usize,
}

/// Runs a task with the given instructions.
pub(super) fn run(simd: Simd, problem: &Problem<'_>, plan: &Plan, task: &Task, out: &Out<'_>) {
    SCRATCH.with_borrow_mut(|scratch| match simd.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value in `Kind::Avx512` exists, so the CPU has these instructions.
        Kind::Avx512(lanes) => unsafe { walk_avx512(lanes, problem, plan, task, out, scratch) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value in `Kind::Avx2` exists, so the CPU has these instructions.
        Kind::Avx2(lanes) => unsafe { walk_avx2(lanes, problem, plan, task, out, scratch) },
        Kind::Scalar => walk(Scalar, problem, plan, task, out, scratch),
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn walk_avx512(lanes: super::avx512::Avx512, problem: &Problem<'_>, plan: &Plan, task: &Task, out: &Out<'_>, scratch: &mut Scratch) {
    walk(lanes, problem, plan, task, out, scratch);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn walk_avx2(lanes: super::avx2::Avx2, problem: &Problem<'_>, plan: &Plan, task: &Task, out: &Out<'_>, scratch: &mut Scratch) {
    walk(lanes, problem, plan, task, out, scratch);
}

/// The queries of a task, `[rows, its kv heads, G]`, and what they have gathered.
struct Queries<'a> {
    heads: std::ops::Range<usize>,
    group: usize,
    head_dim: usize,
    /// Vectors of a head dim, the last one filled with zeros.
    lines: usize,
    softcap: f32,
    q: &'a [Line],
    o: &'a mut [Line],
    running: &'a mut [Running],
    /// `[kv heads, G, CHUNK]` of one row.
    scores: &'a mut [f32],
    /// A chunk of keys and one of values in fp32, `[kv heads, CHUNK, lines]`.
    packed: [&'a mut [f32]; 2],
}

#[inline(always)]
fn walk<L: Lanes>(lanes: L, problem: &Problem<'_>, plan: &Plan, task: &Task, out: &Out<'_>, scratch: &mut Scratch) {
    let Shape { heads, kv_heads, head_dim, .. } = problem.shape;
    let (group, lines, rows) = (heads / kv_heads, head_dim.div_ceil(WIDTH), &plan.rows[task.rows.clone()]);
    let queries = rows.len() * task.heads.len() * group;
    let (size, packed, scores) = (queries * lines * WIDTH, task.heads.len() * CHUNK * lines * WIDTH, task.heads.len() * group * CHUNK);
    let Scratch { floats, running, users } = scratch;
    floats.resize((2 * (size + packed) + scores + CACHE_LINE).max(floats.len()), 0.0);
    running.clear();
    running.resize(queries, Running::EMPTY);
    let skip = floats.as_ptr().align_offset(CACHE_LINE).min(CACHE_LINE);
    let (q, rest) = floats[skip..].split_at_mut(size);
    let (o, rest) = rest.split_at_mut(size);
    let (packed_k, rest) = rest.split_at_mut(packed);
    let (packed_v, rest) = rest.split_at_mut(packed);
    o.fill(0.0);
    let q = q.as_chunks_mut().0;
    for ((i, q), at) in q.chunks_exact_mut(lines * group * task.heads.len()).enumerate().zip(rows) {
        debug_assert!(i < rows.len());
        load_queries(problem, at.number, task.heads.start * group, q, lines);
    }
    let mut state = Queries {
        heads: task.heads.clone(),
        group,
        head_dim,
        lines,
        softcap: problem.softcap,
        q,
        o: o.as_chunks_mut().0,
        running,
        scores: &mut rest[..scores],
        packed: [packed_k, packed_v],
    };
    users.clear();
    users.extend(rows.iter().enumerate().flat_map(|(row, r)| plan.uses[r.uses.clone()].iter().map(move |u| User { block: u.block, row, first: u.first })));
    users.sort_unstable();
    match problem.prefix {
        Source::F32 { k, v } => blocks(lanes, &mut state, [k, v], kv_heads * head_dim, plan, users),
        Source::Bf16 { k, v } => blocks(lanes, &mut state, [k, v], kv_heads * head_dim, plan, users),
    }
    match problem.own {
        Source::F32 { k, v } => own_keys(lanes, &mut state, [k, v], kv_heads * head_dim, plan, task),
        Source::Bf16 { k, v } => own_keys(lanes, &mut state, [k, v], kv_heads * head_dim, plan, task),
    }
    for (i, row) in rows.iter().enumerate() {
        let each = task.heads.len() * group;
        for j in 0..each {
            let at = i * each + j;
            out.write(row.number, task.heads.start * group + j, state.running[at], &state.o[at * lines..(at + 1) * lines]);
        }
    }
}

/// Copies the queries of one row, times scale, from head `first` on.
#[inline(always)]
fn load_queries(problem: &Problem<'_>, row: usize, first: usize, to: &mut [Line], lines: usize) {
    let head_dim = problem.shape.head_dim;
    for (j, to) in to.chunks_exact_mut(lines).enumerate() {
        let start = row * problem.q_strides[0] + (first + j) * problem.q_strides[1];
        let to = to.as_flattened_mut();
        match problem.q {
            Floats::F32(q) => scaled(&q[start..start + head_dim], problem.scale, to),
            Floats::Bf16(q) => scaled(&q[start..start + head_dim], problem.scale, to),
        }
        to[head_dim..].fill(0.0);
    }
}

#[inline(always)]
fn scaled<K: Element>(from: &[K], scale: f32, to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.float() * scale;
    }
}

/// All blocks of a task, each chunk of rows by all its users.
#[inline(always)]
fn blocks<L: Lanes, K: Element>(lanes: L, state: &mut Queries<'_>, memory: [&[K]; 2], stride: usize, plan: &Plan, users: &[User]) {
    for users in users.chunk_by(|a, b| a.block == b.block) {
        let block = plan.blocks[users[0].block];
        let seen = users.iter().map(|u| u.first).min().unwrap_or(0);
        let mut start = seen / CHUNK * CHUNK; // chunks are cut at the same rows whoever sees them
        let mut at = starts(block.start + start, stride);
        while start < block.rows {
            let count = CHUNK.min(block.rows - start);
            let next = starts(block.start + start + count, stride);
            let ahead = CHUNK.min(block.rows - start - count);
            chunk(lanes, state, memory, &at[..count], &next[..ahead], users.iter().map(|u| (u.row, u.first.max(start) - start)), users.len());
            start += count;
            at = next;
        }
    }
}

/// Where the rows of a chunk start.
#[inline(always)]
fn starts(first: usize, stride: usize) -> [usize; CHUNK] {
    std::array::from_fn(|j| (first + j) * stride)
}

/// The own keys of all rows of a task.
#[inline(always)]
fn own_keys<L: Lanes, K: Element>(lanes: L, state: &mut Queries<'_>, memory: [&[K]; 2], stride: usize, plan: &Plan, task: &Task) {
    for (i, row) in plan.rows[task.rows.clone()].iter().enumerate() {
        let slots = &plan.slots[row.slots.clone()];
        let mut at = [0; CHUNK];
        let mut next = [0; CHUNK];
        let mut count = slots_of(slots, 0, stride, &mut next);
        let mut start = 0;
        while count > 0 {
            at[..count].copy_from_slice(&next[..count]);
            let ahead = slots_of(slots, start + count, stride, &mut next);
            chunk(lanes, state, memory, &at[..count], &next[..ahead], std::iter::once((i, 0)), 1);
            start += count;
            count = ahead;
        }
    }
}

/// Where the own keys from `start` on lie; how many there are.
#[inline(always)]
fn slots_of(slots: &[usize], start: usize, stride: usize, at: &mut [usize; CHUNK]) -> usize {
    let mut count = 0;
    for (to, slot) in at.iter_mut().zip(&slots[start..]) {
        *to = slot * stride;
        count += 1;
    }
    count
}

/// One chunk of rows by its users, (row of the task, first key seen); `next` is the chunk that follows.
#[inline(always)]
fn chunk<L: Lanes, K: Element>(
    lanes: L,
    state: &mut Queries<'_>,
    memory: [&[K]; 2],
    at: &[usize],
    next: &[usize],
    users: impl Iterator<Item = (usize, usize)> + Clone,
    num_users: usize,
) {
    if num_users < PACK_FROM && state.head_dim.is_multiple_of(WIDTH) {
        for (row, first) in users {
            if first < at.len() {
                in_place(lanes, state, memory, &at[first..], next, row);
            }
        }
        return;
    }
    let width = state.lines * WIDTH;
    for (to, from) in state.packed.iter_mut().zip(memory) {
        copy(lanes, from, at, next, (&state.heads, state.head_dim), to, width);
    }
    let here = starts(0, width);
    let mut scores = [0.0; CHUNK];
    for h in 0..state.heads.len() {
        let skip = h * CHUNK * width;
        for (row, first) in users.clone().filter(|(_, first)| *first < at.len()) {
            let at = &here[first..at.len()];
            for i in (row * state.heads.len() + h) * state.group..(row * state.heads.len() + h + 1) * state.group {
                let (q, o) = (&state.q[i * state.lines..][..state.lines], &mut state.o[i * state.lines..][..state.lines]);
                for j in (0..at.len()).step_by(4) {
                    let found = score(lanes, q, Chunk { data: &*state.packed[0], at, skip }, j);
                    scores[j..j + 4].copy_from_slice(&found);
                }
                weigh(lanes, &mut scores, at.len(), state.softcap, &mut state.running[i], o);
                gather(lanes, &scores[..at.len()], Chunk { data: &*state.packed[1], at, skip }, 0, o);
            }
        }
    }
}

/// One row's queries over a chunk where it lies, four keys at a time for all heads: memory is read as it lies, the next four keys are on their way.
#[inline(always)]
fn in_place<L: Lanes, K: Element>(lanes: L, state: &mut Queries<'_>, memory: [&[K]; 2], at: &[usize], next: &[usize], row: usize) {
    let (heads, group, lines, head_dim) = (state.heads.len(), state.group, state.lines, state.head_dim);
    let queries = row * heads * group..(row + 1) * heads * group;
    let (q, o) = (&state.q[queries.start * lines..queries.end * lines], &mut state.o[queries.start * lines..queries.end * lines]);
    let running = &mut state.running[queries];
    let scores = state.scores.as_chunks_mut::<CHUNK>().0;
    let count = at.len();
    for j in (0..count).step_by(4) {
        let (soon, from) = if j + 4 < count { (&at[j + 4..], memory[0]) } else { (at, memory[1]) };
        for h in 0..heads {
            let skip = (state.heads.start + h) * head_dim;
            prefetch(lanes, from, soon, skip, head_dim);
            for i in h * group..(h + 1) * group {
                let found = score(lanes, &q[i * lines..][..lines], Chunk { data: memory[0], at, skip }, j);
                scores[i][j..j + 4].copy_from_slice(&found);
            }
        }
    }
    for (i, o) in o.chunks_exact_mut(lines).enumerate() {
        weigh(lanes, &mut scores[i], count, state.softcap, &mut running[i], o);
    }
    for j in (0..count).step_by(4) {
        let (soon, from) = if j + 4 < count { (&at[j + 4..], memory[1]) } else { (next, memory[0]) };
        for h in 0..heads {
            let skip = (state.heads.start + h) * head_dim;
            prefetch(lanes, from, soon, skip, head_dim);
            for i in h * group..(h + 1) * group {
                gather(lanes, &scores[i][j..count.min(j + 4)], Chunk { data: memory[1], at, skip }, j, &mut o[i * lines..][..lines]);
            }
        }
    }
}

/// Copies the heads of a chunk to fp32, `[heads, CHUNK, width]`, each key filled up with zeros.
#[inline(always)]
fn copy<L: Lanes, K: Element>(lanes: L, from: &[K], at: &[usize], next: &[usize], (heads, head_dim): (&std::ops::Range<usize>, usize), to: &mut [f32], width: usize) {
    for (j, start) in at.iter().enumerate() {
        let soon = if j + 4 < at.len() { &at[j + 4..j + 5] } else { next.get(j % 4..j % 4 + 1).unwrap_or(&[]) };
        for (h, head) in heads.clone().enumerate() {
            prefetch(lanes, from, soon, head * head_dim, head_dim);
            let (from, rest) = from[start + head * head_dim..][..head_dim].as_chunks::<WIDTH>();
            let (to, tail) = to[(h * CHUNK + j) * width..][..width].split_at_mut(head_dim - rest.len());
            for (from, to) in from.iter().zip(to.as_chunks_mut().0) {
                lanes.store(K::load(lanes, from), to);
            }
            tail.fill(0.0);
            for (from, to) in rest.iter().zip(tail) {
                *to = from.float();
            }
        }
    }
}

/// Asks for one head of up to four rows.
#[inline(always)]
fn prefetch<L: Lanes, K>(lanes: L, memory: &[K], at: &[usize], skip: usize, head_dim: usize) {
    for start in &at[..at.len().min(4)] {
        for x in memory[start + skip..][..head_dim].iter().step_by(CACHE_LINE / size_of::<K>()) {
            lanes.prefetch(x);
        }
    }
}

/// Where results go.
pub(super) struct Out<'a> {
    o: Numbers,
    lse: *mut f32,
    shape: Shape,
    memory: PhantomData<&'a mut [f32]>,
}

enum Numbers {
    F32(*mut f32),
    Bf16(*mut u16),
}

// SAFETY: the pointers come from exclusive borrows of plain numbers that live as long as the value; threads write disjoint parts (`Out::write`).
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    /// `output` has the sizes of `shape` (`check`).
    pub(super) fn new(shape: Shape, output: Output<'a>) -> Self {
        let o = match output.o {
            FloatsMut::F32(o) => Numbers::F32(o.as_mut_ptr()),
            FloatsMut::Bf16(o) => Numbers::Bf16(o.as_mut_ptr()),
        };
        Self { o, lse: output.lse.as_mut_ptr(), shape, memory: PhantomData }
    }

    /// Writes one query's result. A query that has seen nothing gives 0 and -inf.
    fn write(&self, row: usize, head: usize, running: Running, o: &[Line]) {
        assert!(row < self.shape.rows && head < self.shape.heads);
        let (at, head_dim) = (row * self.shape.heads + head, self.shape.head_dim);
        let share = if running.sum == 0.0 { 0.0 } else { 1.0 / running.sum };
        let values = o.as_flattened().iter().map(|x| x * share);
        // SAFETY: row and head are in range, so entry `at` of lse and numbers `at * D ..` of o lie within the borrowed memory, whose sizes `check` has
        // compared with the shape. The tasks partition (row, kv head) and each runs once, so no other thread touches this query's part.
        let to = unsafe {
            *self.lse.add(at) = running.max + running.sum.ln();
            match self.o {
                Numbers::F32(o) => FloatsMut::F32(std::slice::from_raw_parts_mut(o.add(at * head_dim), head_dim)),
                Numbers::Bf16(o) => FloatsMut::Bf16(std::slice::from_raw_parts_mut(o.add(at * head_dim), head_dim)),
            }
        };
        match to {
            FloatsMut::F32(to) => to.iter_mut().zip(values).for_each(|(to, x)| *to = x),
            FloatsMut::Bf16(to) => to.iter_mut().zip(values).for_each(|(to, x)| *to = bf16(x)),
        }
    }
}

/// The nearest bf16, ties to even.
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let kept = if x.is_nan() { 0x7fc0_0000 } else { rounded };
    kept.to_be_bytes()[..2].iter().fold(0, |sum, byte| sum << 8 | u16::from(*byte))
}
