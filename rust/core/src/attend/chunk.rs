//! One chunk of a task's keys by the queries that see them: in place for one row, from a copy in fp32 for several, many of them across (`across`).

use std::ops::Range;

use super::online_softmax::{CHUNK, Chunk, Running, gather, score, weigh};
use super::transposed::{self, Across};
use super::vector::{Element, Lanes, Line, WIDTH};

/// From this many rows on a chunk is first copied, as fp32 and head by head.
const PACK_FROM: usize = 2;
/// Keys that are on their way while one is copied.
const COPIED_AHEAD: usize = 12;
/// Bytes that come from memory together.
pub(super) const CACHE_LINE: usize = 64;

/// The queries of a task, `[rows, its kv heads, G]`, and what they have gathered.
pub(super) struct Queries<'a> {
    /// The task's kv heads.
    pub(super) heads: Range<usize>,
    pub(super) group: usize,
    pub(super) head_dim: usize,
    /// Vectors of a head dim, the last one filled up with zeros.
    pub(super) lines: usize,
    pub(super) softcap: f32,
    /// Times scale.
    pub(super) q: &'a mut [Line],
    pub(super) o: &'a mut [Line],
    pub(super) running: &'a mut [Running],
    /// `[kv heads, G, CHUNK]` of one row.
    scores: &'a mut [f32],
    /// A chunk of keys and one of values in fp32, `[kv heads, CHUNK, lines]`.
    packed: [&'a mut [f32]; 2],
    pub(super) across: Across<'a>,
}

impl<'a> Queries<'a> {
    /// Empty queries of some rows in memory that is kept from call to call.
    pub(super) fn new(
        (rows, heads, group): (usize, &Range<usize>, usize),
        head_dim: usize,
        softcap: f32,
        floats: &'a mut Vec<f32>,
        running: &'a mut Vec<Running>,
    ) -> Self {
        let (lines, queries) = (head_dim.div_ceil(WIDTH), rows * heads.len() * group);
        let size = queries * lines * WIDTH;
        let packed = heads.len() * CHUNK * lines * WIDTH;
        let scores = heads.len() * group * CHUNK;
        let across = Across::floats(rows, heads.len(), group, lines);
        let all = 2 * (size + packed) + scores + across + CACHE_LINE;
        floats.resize(all.max(floats.len()), 0.0);
        running.clear();
        running.resize(queries, Running::EMPTY);
        // Whole vectors in one cache line each: one that lies in two costs two loads.
        let skip = floats.as_ptr().align_offset(CACHE_LINE).min(CACHE_LINE);
        let (q, rest) = floats[skip..].split_at_mut(size);
        let (o, rest) = rest.split_at_mut(size);
        let (keys, rest) = rest.split_at_mut(packed);
        let (values, rest) = rest.split_at_mut(packed);
        let (scores, rest) = rest.split_at_mut(scores);
        o.fill(0.0);
        Self {
            heads: heads.clone(),
            group,
            head_dim,
            lines,
            softcap,
            q: q.as_chunks_mut().0,
            o: o.as_chunks_mut().0,
            running,
            scores,
            packed: [keys, values],
            across: Across::new(&mut rest[..across], heads.len() * (rows * group).div_ceil(WIDTH), lines),
        }
    }
}

/// Where the rows of a chunk start.
#[inline(always)]
pub(super) fn starts(first: usize, stride: usize) -> [usize; CHUNK] {
    std::array::from_fn(|j| (first + j) * stride)
}

/// A row of the task that sees a block from its row `first` on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct User {
    pub(super) block: usize,
    pub(super) row: usize,
    pub(super) first: usize,
}

impl User {
    /// The first key that it sees of a chunk whose first key is number `start`.
    fn first_of(&self, start: usize) -> usize {
        self.first.max(start) - start
    }
}

/// One chunk by its users; its first key is number `start` of the block, and `next` is the chunk that follows.
#[inline(always)]
pub(super) fn chunk<L: Lanes, K: Element>(
    lanes: L,
    state: &mut Queries<'_>,
    memory: [&[K]; 2],
    (at, next): (&[usize], &[usize]),
    start: usize,
    users: &[User],
) {
    if users.len() < PACK_FROM && state.head_dim.is_multiple_of(WIDTH) {
        for user in users.iter().filter(|u| u.first_of(start) < at.len()) {
            in_place(lanes, state, memory, &at[user.first_of(start)..], next, user.row);
        }
        return;
    }
    let parts = state.heads.len() * users.len();
    let here = starts(0, state.lines * WIDTH);
    let mut scores = [0.0; CHUNK];
    copy_both(lanes, state, memory, at);
    for part in 0..parts {
        call_next(lanes, state, memory, next, part, parts);
        let user = users[part % users.len()];
        if user.first_of(start) < at.len() {
            let here = &here[user.first_of(start)..at.len()];
            copied(lanes, state, here, (user.row, part / users.len()), &mut scores);
        }
    }
}

/// One chunk by users who all see it whole and whose queries lie across; `next` is the chunk that follows.
#[inline(always)]
pub(super) fn chunk_across<L: Lanes, K: Element>(
    lanes: L,
    state: &mut Queries<'_>,
    memory: [&[K]; 2],
    (at, next): (&[usize], &[usize]),
    vectors: usize,
) {
    let here = starts(0, state.lines * WIDTH);
    let parts = state.heads.len() * vectors;
    copy_both(lanes, state, memory, at);
    for part in 0..parts {
        call_next(lanes, state, memory, next, part, parts);
        let [keys, values] = [&*state.packed[0], &*state.packed[1]];
        let (at, skip) = (&here[..at.len()], part / vectors * CHUNK * state.lines * WIDTH);
        let [keys, values] = [Chunk { data: keys, at, skip }, Chunk { data: values, at, skip }];
        let softcap = state.softcap;
        transposed::vector(lanes, &mut state.across, part, softcap, keys, values);
    }
}

/// Copies the keys and the values of a chunk.
#[inline(always)]
fn copy_both<L: Lanes, K: Element>(lanes: L, state: &mut Queries<'_>, memory: [&[K]; 2], at: &[usize]) {
    for (to, from) in state.packed.iter_mut().zip(memory) {
        copy(lanes, from, at, (&state.heads, state.head_dim), to);
    }
}

/// Asks for one of some parts of the next chunk, so that it is on its way while this one is used.
#[inline(always)]
fn call_next<L: Lanes, K: Element>(
    lanes: L,
    state: &Queries<'_>,
    memory: [&[K]; 2],
    next: &[usize],
    part: usize,
    parts: usize,
) {
    let all = state.heads.start * state.head_dim..state.heads.end * state.head_dim;
    for start in &next[part * next.len() / parts..(part + 1) * next.len() / parts] {
        for memory in memory {
            each_line(&memory[start + all.start..start + all.end], |x| {
                lanes.prefetch(x);
            });
        }
    }
}

/// One row's queries of one head over keys of the copied chunk.
#[inline(always)]
fn copied<L: Lanes>(
    lanes: L,
    state: &mut Queries<'_>,
    at: &[usize],
    (row, h): (usize, usize),
    scores: &mut [f32; CHUNK],
) {
    let (lines, count) = (state.lines, at.len());
    let skip = h * CHUNK * lines * WIDTH;
    let first = (row * state.heads.len() + h) * state.group;
    for i in first..first + state.group {
        let (q, o) = (&state.q[i * lines..][..lines], &mut state.o[i * lines..][..lines]);
        let [k, v] = state.packed.each_ref().map(|data| Chunk { data, at, skip });
        for j in (0..count).step_by(4) {
            scores[j..j + 4].copy_from_slice(&score(lanes, q, k, j));
        }
        weigh(lanes, scores, count, state.softcap, &mut state.running[i], o);
        gather(lanes, &scores[..count], v, 0, o);
    }
}

/// One row's queries over a chunk where it lies, four keys at a time for all heads: memory is read as it lies, the next four keys are on their way.
#[inline(always)]
fn in_place<L: Lanes, K: Element>(
    lanes: L,
    state: &mut Queries<'_>,
    memory: [&[K]; 2],
    at: &[usize],
    next: &[usize],
    row: usize,
) {
    let (heads, group, lines, head_dim) = (state.heads.len(), state.group, state.lines, state.head_dim);
    let queries = row * heads * group..(row + 1) * heads * group;
    let (q, o) = (
        &state.q[queries.start * lines..queries.end * lines],
        &mut state.o[queries.start * lines..queries.end * lines],
    );
    let running = &mut state.running[queries];
    let scores = state.scores.as_chunks_mut::<CHUNK>().0;
    let count = at.len();
    for j in (0..count).step_by(4) {
        let (soon, from) = if j + 4 < count {
            (&at[j + 4..], memory[0])
        } else {
            (at, memory[1])
        };
        for h in 0..heads {
            let skip = (state.heads.start + h) * head_dim;
            prefetch(lanes, from, soon, skip, head_dim);
            for i in h * group..(h + 1) * group {
                let found = score(
                    lanes,
                    &q[i * lines..][..lines],
                    Chunk {
                        data: memory[0],
                        at,
                        skip,
                    },
                    j,
                );
                scores[i][j..j + 4].copy_from_slice(&found);
            }
        }
    }
    for (i, o) in o.chunks_exact_mut(lines).enumerate() {
        weigh(lanes, &mut scores[i], count, state.softcap, &mut running[i], o);
    }
    for j in (0..count).step_by(4) {
        let (soon, from) = if j + 4 < count {
            (&at[j + 4..], memory[1])
        } else {
            (next, memory[0])
        };
        for h in 0..heads {
            let skip = (state.heads.start + h) * head_dim;
            prefetch(lanes, from, soon, skip, head_dim);
            for i in h * group..(h + 1) * group {
                gather(
                    lanes,
                    &scores[i][j..count.min(j + 4)],
                    Chunk {
                        data: memory[1],
                        at,
                        skip,
                    },
                    j,
                    &mut o[i * lines..][..lines],
                );
            }
        }
    }
}

/// Copies the heads of a chunk to fp32, `[heads, CHUNK, head dim]`, each key filled up with zeros.
#[inline(always)]
fn copy<L: Lanes, K: Element>(
    lanes: L,
    from: &[K],
    at: &[usize],
    (heads, head_dim): (&Range<usize>, usize),
    to: &mut [f32],
) {
    let width = head_dim.next_multiple_of(WIDTH);
    for (j, start) in at.iter().enumerate() {
        for (h, head) in heads.clone().enumerate() {
            prefetch(
                lanes,
                from,
                at.get(j + COPIED_AHEAD).map_or(&[], std::slice::from_ref),
                head * head_dim,
                head_dim,
            );
            let (from, rest) = from[start + head * head_dim..][..head_dim].as_chunks::<WIDTH>();
            let to = &mut to[(h * CHUNK + j) * width..][..width];
            let (to, tail) = to.split_at_mut(head_dim - rest.len());
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
        each_line(&memory[start + skip..][..head_dim], |x| lanes.prefetch(x));
    }
}

/// Calls something for every cache line.
#[inline(always)]
fn each_line<K>(memory: &[K], call: impl Fn(&K)) {
    memory.iter().step_by(CACHE_LINE / size_of::<K>()).for_each(call);
}
