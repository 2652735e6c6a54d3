//! One task: its queries over their blocks, then over their own keys.

use std::cell::RefCell;

use super::chunk::{Queries, User, chunk, chunk_across, starts};
use super::dispatch::{Kind, Simd};
use super::online_softmax::{CHUNK, Running};
use super::output::Out;
use super::plan::{Plan, Task};
use super::transposed;
use super::vector::{Element, Lanes, Line, Scalar};
use super::{Floats, Problem, Source};

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { floats: Vec::new(), running: Vec::new(), users: Vec::new() }) };
}

/// A thread's memory, kept from call to call: fresh memory would cost page faults.
struct Scratch {
    floats: Vec<f32>,
    running: Vec<Running>,
    users: Vec<User>,
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
fn walk_avx512(
    lanes: super::avx512::Avx512,
    problem: &Problem<'_>,
    plan: &Plan,
    task: &Task,
    out: &Out<'_>,
    scratch: &mut Scratch,
) {
    walk(lanes, problem, plan, task, out, scratch);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn walk_avx2(
    lanes: super::avx2::Avx2,
    problem: &Problem<'_>,
    plan: &Plan,
    task: &Task,
    out: &Out<'_>,
    scratch: &mut Scratch,
) {
    walk(lanes, problem, plan, task, out, scratch);
}

#[inline(always)]
fn walk<L: Lanes>(lanes: L, problem: &Problem<'_>, plan: &Plan, task: &Task, out: &Out<'_>, scratch: &mut Scratch) {
    let shape = problem.shape;
    let (rows, group) = (&plan.rows[task.rows.clone()], shape.heads / shape.kv_heads);
    let Scratch { floats, running, users } = scratch;
    let size = (rows.len(), &task.heads, group);
    let mut state = Queries::new(size, shape.head_dim, problem.softcap, floats, running);
    let (lines, first, each) = (state.lines, task.heads.start * group, task.heads.len() * group);
    for (q, row) in state.q.chunks_exact_mut(lines * each).zip(rows) {
        load_queries(problem, row.number, first, q, lines);
    }
    users.clear();
    for (row, seen) in rows.iter().enumerate() {
        let uses = &plan.uses[seen.uses.clone()];
        users.extend(uses.iter().map(|u| User {
            block: u.block,
            row,
            first: u.first,
        }));
    }
    users.sort_unstable();
    let stride = shape.kv_heads * shape.head_dim;
    match problem.prefix {
        Source::F32 { k, v } => blocks(lanes, &mut state, [k, v], stride, plan, users),
        Source::Bf16 { k, v } => blocks(lanes, &mut state, [k, v], stride, plan, users),
    }
    match problem.own {
        Source::F32 { k, v } => own_keys(lanes, &mut state, [k, v], stride, plan, task),
        Source::Bf16 { k, v } => own_keys(lanes, &mut state, [k, v], stride, plan, task),
    }
    for (i, o) in state.o.chunks_exact(lines).enumerate() {
        out.write(rows[i / each].number, first + i % each, state.running[i], o);
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
fn blocks<L: Lanes, K: Element>(
    lanes: L,
    state: &mut Queries<'_>,
    memory: [&[K]; 2],
    stride: usize,
    plan: &Plan,
    users: &[User],
) {
    for users in users.chunk_by(|a, b| a.block == b.block) {
        let block = plan.blocks[users[0].block];
        let first = |u: &User| u.first;
        let seen = users.iter().map(first).min().unwrap_or(0);
        let whole = users.iter().map(first).max().unwrap_or(0);
        let vectors = transposed::vectors(users, state.group);
        let mut across = false;
        let mut start = seen / CHUNK * CHUNK; // chunks are cut at the same rows whoever sees them
        let mut at = starts(block.start + start, stride);
        while start < block.rows {
            let count = CHUNK.min(block.rows - start);
            let next = starts(block.start + start + count, stride);
            let ahead = CHUNK.min(block.rows - start - count);
            let places = (&at[..count], &next[..ahead]);
            if !across && start >= whole && transposed::pays(users, state.group) {
                across = true;
                transposed::enter(state, users);
            }
            if across {
                chunk_across(lanes, state, memory, places, vectors);
            } else {
                chunk(lanes, state, memory, places, start, users);
            }
            start += count;
            at = next;
        }
        if across {
            transposed::leave(state, users);
        }
    }
}

/// The own keys of all rows of a task.
#[inline(always)]
fn own_keys<L: Lanes, K: Element>(
    lanes: L,
    state: &mut Queries<'_>,
    memory: [&[K]; 2],
    stride: usize,
    plan: &Plan,
    task: &Task,
) {
    for (i, row) in plan.rows[task.rows.clone()].iter().enumerate() {
        let (slots, user) = (
            &plan.slots[row.slots.clone()],
            User {
                block: 0,
                row: i,
                first: 0,
            },
        );
        let mut at = [0; CHUNK];
        let mut next = [0; CHUNK];
        let mut count = slots_of(slots, 0, stride, &mut next);
        let mut start = 0;
        while count > 0 {
            at[..count].copy_from_slice(&next[..count]);
            let ahead = slots_of(slots, start + count, stride, &mut next);
            chunk(lanes, state, memory, (&at[..count], &next[..ahead]), 0, &[user]);
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
