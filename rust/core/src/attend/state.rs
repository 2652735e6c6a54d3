//! State of a task: its queries, their running results, and scratch memory for one chunk of keys.

use std::ops::Range;

use super::bias::Bias;
use super::in_place::ROWS_IN_PLACE;
use super::online_softmax::{CHUNK_KEYS, SoftmaxState};
use super::transposed::{TransposedQueries, num_query_vectors};
use super::vector::{F32x16, LANES};

/// Bytes of a cache line.
pub(super) const CACHE_LINE: usize = 64;

/// Sizes of a task.
#[derive(Debug, Clone)]
pub(super) struct TaskShape {
    /// Number of query rows.
    pub(super) rows: usize,
    /// The task's kv heads.
    pub(super) heads: Range<usize>,
    /// Query heads per kv head.
    pub(super) group_size: usize,
    pub(super) head_dim: usize,
}

/// Queries of a task, `[rows, kv heads of the task, group size]`, and their running results.
pub(super) struct TaskState<'a> {
    /// The task's kv heads.
    pub(super) heads: Range<usize>,
    /// Query heads per kv head.
    pub(super) group_size: usize,
    pub(super) head_dim: usize,
    /// Vectors of 16 floats in a head dim. The last one is padded with zeros.
    pub(super) head_vectors: usize,
    /// Bound of the scores, 0 for none.
    pub(super) softcap: f32,
    pub(super) bias: Option<Bias<'a>>,
    /// Queries multiplied by the softmax scale, `head_vectors` vectors each.
    pub(super) q: &'a mut [F32x16],
    /// Sum of `exp(score - max) * value` of each query, `head_vectors` vectors each.
    pub(super) o: &'a mut [F32x16],
    pub(super) softmax: &'a mut [SoftmaxState],
    /// Queries that read a chunk together. Room is for those of `ROWS_IN_PLACE` rows.
    pub(super) queries: &'a mut Vec<Query>,
    /// Their scores, then weights.
    pub(super) scores: &'a mut [[f32; CHUNK_KEYS]],
    /// Copy of a chunk's keys and one of its values in fp32, `[kv heads, CHUNK_KEYS, head_vectors * 16]`.
    pub(super) copies: [&'a mut [f32]; 2],
    pub(super) transposed: TransposedQueries<'a>,
}

impl<'a> TaskState<'a> {
    /// State without any keys, in memory that is reused from call to call.
    pub(super) fn new(
        shape: TaskShape,
        (softcap, bias): (f32, Option<Bias<'a>>),
        floats: &'a mut Vec<f32>,
        softmax: &'a mut Vec<SoftmaxState>,
        queries: &'a mut Vec<Query>,
    ) -> Self {
        let TaskShape {
            rows,
            heads,
            group_size,
            head_dim,
        } = shape;
        let (head_vectors, num_queries) = (head_dim.div_ceil(LANES), rows * heads.len() * group_size);
        let query_floats = num_queries * head_vectors * LANES;
        let copy_floats = heads.len() * CHUNK_KEYS * head_vectors * LANES;
        let score_floats = ROWS_IN_PLACE * heads.len() * group_size * CHUNK_KEYS;
        let query_vectors = heads.len() * num_query_vectors(rows, group_size);
        let transposed_floats = TransposedQueries::buffer_floats(query_vectors, head_vectors);
        let total = 2 * (query_floats + copy_floats) + score_floats + transposed_floats + CACHE_LINE;
        floats.resize(total.max(floats.len()), 0.0);
        softmax.clear();
        softmax.resize(num_queries, SoftmaxState::EMPTY);
        // Each vector of 16 floats fills one cache line. A vector across two lines would cost two loads.
        let skip = floats.as_ptr().align_offset(CACHE_LINE).min(CACHE_LINE);
        let (q, rest) = floats[skip..].split_at_mut(query_floats);
        let (o, rest) = rest.split_at_mut(query_floats);
        let (keys, rest) = rest.split_at_mut(copy_floats);
        let (values, rest) = rest.split_at_mut(copy_floats);
        let (scores, rest) = rest.split_at_mut(score_floats);
        o.fill(0.0);
        Self {
            heads,
            group_size,
            head_dim,
            head_vectors,
            softcap,
            bias,
            q: q.as_chunks_mut().0,
            o: o.as_chunks_mut().0,
            softmax,
            queries,
            scores: scores.as_chunks_mut().0,
            copies: [keys, values],
            transposed: TransposedQueries::new(&mut rest[..transposed_floats], query_vectors, head_vectors),
        }
    }
}

/// A query over the keys of a chunk.
pub(super) struct Query {
    /// Place in the task's queries.
    pub(super) place: usize,
    /// Query head, of all heads of the model.
    pub(super) head: usize,
    /// Position of the chunk's first key relative to the query.
    pub(super) distance: i64,
}

/// A row of the task that sees a block.
///
/// Sorted users are grouped by place and block, so each row comes to its blocks from left to right, and a row that sees
/// a block twice is in two groups.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BlockUser {
    /// Place of the block in the row's composition, from 0.
    pub(super) place: usize,
    pub(super) block: usize,
    /// Index of the row in the task.
    pub(super) row: usize,
    /// First row of the block that this row sees.
    pub(super) first: usize,
    /// Position of the block's first row relative to the query.
    pub(super) distance: i64,
}

impl BlockUser {
    /// First visible key of a chunk, counted from the chunk's start.
    ///
    /// * `start`: index of the chunk's first key in the block.
    pub(super) fn first_in_chunk(&self, start: usize) -> usize {
        self.first.max(start) - start
    }
    /// Position of row `row` of the block relative to the query.
    pub(super) fn distance_of(&self, row: usize) -> i64 {
        self.distance.saturating_add_unsigned(row as u64)
    }
}
