//! Many queries of one kv head over a chunk, one query in each lane: no sum goes across a vector, and a key is read once for sixteen queries.
//!
//! Every number is made by the same operations in the same order as for a query alone (`query`), so the bits are the same.

use super::chunk::{Queries, User};
use super::math::exp;
use super::online_softmax::{CHUNK, Chunk, Running, cap};
use super::vector::{Lanes, Line, TREE, WIDTH};

/// From this many queries of a kv head on they go one in each lane.
const FROM: usize = 9;

/// Queries that go one in each lane, and what they have gathered: `[kv heads, vectors, head dim]`, a line for one number of sixteen queries.
pub(super) struct Across<'a> {
    /// Vectors of a head dim.
    lines: usize,
    q: &'a mut [Line],
    o: &'a mut [Line],
    /// `[kv heads, vectors]`.
    max: &'a mut [Line],
    sum: &'a mut [Line],
    /// `[CHUNK]` of one vector.
    scores: &'a mut [Line],
}

impl<'a> Across<'a> {
    /// Floats of the memory that it needs.
    pub(super) fn floats(rows: usize, heads: usize, group: usize, lines: usize) -> usize {
        let vectors = heads * (rows * group).div_ceil(WIDTH);
        (2 * vectors * (lines * WIDTH + 1) + CHUNK) * WIDTH
    }

    /// In memory of [`Self::floats`].
    pub(super) fn new(memory: &'a mut [f32], vectors: usize, lines: usize) -> Self {
        let numbers = vectors * lines * WIDTH;
        let (q, rest) = memory.as_chunks_mut().0.split_at_mut(numbers);
        let (o, rest) = rest.split_at_mut(numbers);
        let (max, rest) = rest.split_at_mut(vectors);
        let (sum, scores) = rest.split_at_mut(vectors);
        Self {
            lines,
            q,
            o,
            max,
            sum,
            scores,
        }
    }
}

/// Whether the queries of these users, sorted by row, who all see a chunk whole, go one in each lane. A row that sees the block twice cannot: its second
/// time goes on from the first.
pub(super) fn pays(users: &[User], group: usize) -> bool {
    users.len() * group >= FROM && users.windows(2).all(|pair| pair[0].row != pair[1].row)
}

/// Vectors for the queries that some users have of each kv head.
pub(super) fn vectors(users: &[User], group: usize) -> usize {
    (users.len() * group).div_ceil(WIDTH)
}

/// Lays the users' queries across.
pub(super) fn enter(state: &mut Queries<'_>, users: &[User]) {
    let width = state.lines * WIDTH;
    let Across { q, o, max, sum, .. } = &mut state.across;
    for (lane, i, first) in places(users, state.heads.len(), state.group) {
        let (from, to) = (i * state.lines, first * width);
        for d in 0..width {
            q[to + d][lane] = state.q[from + d / WIDTH][d % WIDTH];
            o[to + d][lane] = state.o[from + d / WIDTH][d % WIDTH];
        }
        max[first][lane] = state.running[i].max;
        sum[first][lane] = state.running[i].sum;
    }
}

/// Lays what the users' queries have gathered back along.
pub(super) fn leave(state: &mut Queries<'_>, users: &[User]) {
    let width = state.lines * WIDTH;
    let Across { o, max, sum, .. } = &state.across;
    for (lane, i, first) in places(users, state.heads.len(), state.group) {
        let (to, from) = (i * state.lines, first * width);
        for d in 0..width {
            state.o[to + d / WIDTH][d % WIDTH] = o[from + d][lane];
        }
        state.running[i] = Running {
            max: max[first][lane],
            sum: sum[first][lane],
        };
    }
}

/// Of every query of some users: its lane, its number along, its vector.
fn places(users: &[User], heads: usize, group: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let vectors = vectors(users, group);
    (0..heads).flat_map(move |h| {
        (0..users.len() * group).map(move |n| {
            let i = (users[n / group].row * heads + h) * group + n % group;
            (n % WIDTH, i, h * vectors + n / WIDTH)
        })
    })
}

/// One vector of queries over keys and values of a chunk that all of them see.
#[inline(always)]
pub(super) fn vector<L: Lanes>(
    lanes: L,
    across: &mut Across<'_>,
    number: usize,
    softcap: f32,
    keys: Chunk<'_, f32>,
    values: Chunk<'_, f32>,
) {
    let (lines, width) = (across.lines, across.lines * WIDTH);
    let scores = &mut across.scores[..keys.at.len()];
    score(lanes, &across.q[number * width..][..width], keys, lines, scores);
    if softcap > 0.0 {
        cap(lanes, softcap, scores);
    }
    let share = weigh(lanes, scores, &mut across.max[number], &mut across.sum[number]);
    let o = &mut across.o[number * width..][..width];
    if L::REGISTERS >= 32 {
        gather::<L, 16>(lanes, scores, values, lines, share, o);
    } else {
        gather::<L, 4>(lanes, scores, values, lines, share, o);
    }
}

/// Scores of all keys.
#[inline(always)]
fn score<L: Lanes>(lanes: L, q: &[Line], keys: Chunk<'_, f32>, lines: usize, scores: &mut [Line]) {
    let mut done = 0;
    if L::REGISTERS >= 32 {
        let fours = scores.as_chunks_mut::<4>().0;
        done = 4 * fours.len();
        for (j, to) in fours.iter_mut().enumerate() {
            let key = |n| keys.key(4 * j + n, lines);
            products(lanes, q, [key(0), key(1), key(2), key(3)], to);
        }
    }
    for (j, to) in scores.iter_mut().enumerate().skip(done) {
        products(lanes, q, [keys.key(j, lines)], std::array::from_mut(to));
    }
}

/// Products of sixteen queries with `N` keys.
#[inline(always)]
fn products<L: Lanes, const N: usize>(lanes: L, q: &[Line], keys: [&[Line]; N], to: &mut [Line; N]) {
    let lines = keys[0].len();
    let (q, keys) = (&q.as_chunks::<WIDTH>().0[..lines], keys.map(|key| &key[..lines]));
    let parts = [
        four_lanes(lanes, q, keys, TREE[0]),
        four_lanes(lanes, q, keys, TREE[1]),
        four_lanes(lanes, q, keys, TREE[2]),
        four_lanes(lanes, q, keys, TREE[3]),
    ];
    for n in 0..N {
        let all = add(lanes, [parts[0][n], parts[1][n], parts[2][n], parts[3][n]]);
        lanes.store(all, &mut to[n]);
    }
}

/// What four lanes of `query::score`'s vectors would hold, added up.
#[inline(always)]
fn four_lanes<L: Lanes, const N: usize>(
    lanes: L,
    q: &[[Line; WIDTH]],
    keys: [&[Line]; N],
    places: [usize; 4],
) -> [L::V; N] {
    let mut sums = [[lanes.splat(0.0); 4]; N];
    for (i, q) in q.iter().enumerate() {
        for t in 0..4 {
            let x = lanes.load(&q[places[t]]);
            for n in 0..N {
                sums[n][t] = lanes.fma(x, lanes.splat(keys[n][i][places[t]]), sums[n][t]);
            }
        }
    }
    let mut out = [lanes.splat(0.0); N];
    for n in 0..N {
        out[n] = add(lanes, sums[n]);
    }
    out
}

/// As [`TREE`] says.
#[inline(always)]
fn add<L: Lanes>(lanes: L, [a, b, c, d]: [L::V; 4]) -> L::V {
    lanes.add(lanes.add(a, b), lanes.add(c, d))
}

/// Turns scores into `exp(score - max)` under the new maximum; returns what brings what was gathered so far to that maximum.
#[inline(always)]
fn weigh<L: Lanes>(lanes: L, scores: &mut [Line], max: &mut Line, sum: &mut Line) -> L::V {
    let (none, old) = (lanes.splat(f32::NEG_INFINITY), lanes.load(max));
    let mut new = old;
    for line in &*scores {
        new = lanes.max(new, lanes.load(line));
    }
    let share = lanes.where_less(
        old,
        new,
        exp(lanes, lanes.add(old, lanes.mul(lanes.splat(-1.0), new))),
        lanes.splat(1.0),
    );
    let shift = lanes.where_less(
        none,
        new,
        lanes.mul(lanes.splat(-1.0), new),
        lanes.splat(0.0), // every score so far is -inf
    );
    let mut parts = [lanes.splat(0.0); 4];
    for part in 0..4 {
        let mut sums = [lanes.splat(0.0); 4];
        for t in 0..4 {
            for line in scores.iter_mut().skip(TREE[part][t]).step_by(WIDTH) {
                let weight = exp(lanes, lanes.add(lanes.load(line), shift));
                sums[t] = lanes.add(sums[t], weight);
                lanes.store(weight, line);
            }
        }
        parts[part] = add(lanes, sums);
    }
    let added = add(lanes, parts);
    lanes.store(lanes.add(lanes.mul(share, lanes.load(sum)), added), sum);
    lanes.store(new, max);
    share
}

/// Adds all weights times values to what was gathered so far times `share`, `N` numbers of the head dim at a time.
#[inline(always)]
fn gather<L: Lanes, const N: usize>(
    lanes: L,
    weights: &[Line],
    values: Chunk<'_, f32>,
    lines: usize,
    share: L::V,
    o: &mut [Line],
) {
    for (line, o) in o.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
        for (part, o) in o.as_chunks_mut::<N>().0.iter_mut().enumerate() {
            let mut sums = [share; N];
            for n in 0..N {
                sums[n] = lanes.mul(share, lanes.load(&o[n]));
            }
            for (j, weight) in weights.iter().enumerate() {
                let weight = lanes.load(weight);
                let value = &values.key(j, lines)[line].as_chunks::<N>().0[part];
                for n in 0..N {
                    sums[n] = lanes.fma(weight, lanes.splat(value[n]), sums[n]);
                }
            }
            for n in 0..N {
                lanes.store(sums[n], &mut o[n]);
            }
        }
    }
}
