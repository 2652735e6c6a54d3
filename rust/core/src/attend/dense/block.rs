//! Attention of a block of queries of one head: what it reads and writes, and the steps on an instruction set.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use super::chunk::{add_values, hide_later_keys, pack_weights, score_chunk, update_softmax};
use super::products::{Fma, Products};
use super::rows::{copy_keys_and_values, copy_queries, write};
use super::{KEYS, PerQuery, Strided, VECTORS};
use crate::attend::dispatch::Kind;
use crate::attend::vector::{F32x16, LANES, Scalar, SimdOps};
use crate::attend::{Floats, InstructionSet};

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::EMPTY) };
}

/// Memory of a thread, reused from call to call because fresh memory costs page faults.
pub(super) struct Scratch {
    /// Keys and values of one head, `[S, D]`. Rows have whole vectors, and both sizes are padded by zeros. With
    /// products of pairs two dims of a key, or of two values, lie in a lane.
    pub(super) keys: Vec<F32x16>,
    pub(super) values: Vec<F32x16>,
    /// Queries and sums of weighted values, `[D, QUERIES]`.
    pub(super) q: Vec<PerQuery>,
    pub(super) o: Vec<PerQuery>,
    /// Scores, then weights of one chunk of keys.
    pub(super) scores: Vec<PerQuery>,
    /// Largest score, and sum of the weights relative to it.
    pub(super) max: PerQuery,
    pub(super) sum: PerQuery,
    /// Vectors with queries, at most [`VECTORS`].
    pub(super) vectors: usize,
}

impl Scratch {
    const EMPTY: Self = Self {
        keys: Vec::new(),
        values: Vec::new(),
        q: Vec::new(),
        o: Vec::new(),
        scores: Vec::new(),
        max: [[0.0; LANES]; VECTORS],
        sum: [[0.0; LANES]; VECTORS],
        vectors: 0,
    };
}

/// Neighbouring rows of one head of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) tensor: Strided<'a>,
    /// Sequence and head.
    pub(super) place: [usize; 2],
    /// First row, and number of rows.
    pub(super) first: usize,
    pub(super) count: usize,
}

/// Keys that the queries of a block see, and how.
#[derive(Clone, Copy)]
pub(super) struct View {
    /// Head dim.
    pub(super) dim: usize,
    /// Number of keys.
    pub(super) keys: usize,
    pub(super) scale: f32,
    /// Index of the key that is the first query's own, if a query sees no later keys than its own.
    pub(super) own: Option<usize>,
}

impl View {
    /// Number of keys that a block of `count` queries sees.
    pub(super) fn seen(&self, count: usize) -> usize {
        self.own.map_or(self.keys, |own| self.keys.min(own + count))
    }
}

/// Memory of output and log-sum-exp of a block, from its first query on.
pub(super) struct Out<'a, T> {
    pub(super) o: &'a mut [MaybeUninit<T>],
    pub(super) lse: &'a mut [MaybeUninit<f32>],
    /// Elements of each from one query to the next.
    pub(super) strides: [usize; 2],
}

/// Function of a block of queries over the keys in the scratch memory, for an instruction set.
pub(super) fn run_block<T>(
    instructions: InstructionSet,
    (sources, queries): (Option<&[[Rows<'_>; 2]]>, Rows<'_>),
    view: View,
    scratch: &mut Scratch,
    out: Out<'_, T>,
    convert: impl Fn(f32) -> T,
) {
    let rows = (sources, queries);
    match instructions.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the values in `Kind::Avx512` prove that the CPU has the enabled instructions.
        Kind::Avx512(simd, bf16) => unsafe {
            match (bf16, queries.tensor.data) {
                (Some(bf16), Floats::Bf16(_)) => of_block_bf16((simd, bf16), rows, view, scratch, out, convert),
                _ => of_block_avx512(simd, rows, view, scratch, out, convert),
            }
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value in `Kind::Avx2` proves that the CPU has the enabled instructions.
        Kind::Avx2(simd) => unsafe { of_block_avx2(simd, rows, view, scratch, out, convert) },
        Kind::Scalar => of_block((Scalar, Fma(Scalar)), rows, view, scratch, out, convert),
    }
}

/// Keys and values to be copied first, None if they lie in the scratch memory, and queries.
pub(super) type Sources<'a, 'b> = (Option<&'a [[Rows<'b>; 2]]>, Rows<'b>);

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16,avx2,fma")]
fn of_block_bf16<T>(
    simd: (crate::attend::avx512::Avx512, crate::attend::avx512::Avx512Bf16),
    rows: Sources<'_, '_>,
    view: View,
    scratch: &mut Scratch,
    out: Out<'_, T>,
    convert: impl Fn(f32) -> T,
) {
    of_block(simd, rows, view, scratch, out, convert);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn of_block_avx512<T>(
    simd: crate::attend::avx512::Avx512,
    rows: Sources<'_, '_>,
    view: View,
    scratch: &mut Scratch,
    out: Out<'_, T>,
    convert: impl Fn(f32) -> T,
) {
    of_block((simd, Fma(simd)), rows, view, scratch, out, convert);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn of_block_avx2<T>(
    simd: crate::attend::avx2::Avx2,
    rows: Sources<'_, '_>,
    view: View,
    scratch: &mut Scratch,
    out: Out<'_, T>,
    convert: impl Fn(f32) -> T,
) {
    of_block((simd, Fma(simd)), rows, view, scratch, out, convert);
}

#[inline(always)]
fn of_block<S: SimdOps, P: Products<S>, T>(
    (simd, products): (S, P),
    (sources, queries): Sources<'_, '_>,
    view: View,
    scratch: &mut Scratch,
    out: Out<'_, T>,
    convert: impl Fn(f32) -> T,
) {
    let dim = view.dim;
    if let Some(sources) = sources {
        copy_keys_and_values::<S, P>(simd, sources, dim, scratch);
    }
    copy_queries::<S, P>(simd, queries, dim, &mut scratch.q);
    scratch.o.clear();
    scratch.o.resize(dim.next_multiple_of(LANES), PerQuery::default());
    scratch.max = [[f32::NEG_INFINITY; LANES]; VECTORS];
    scratch.sum = PerQuery::default();
    scratch.vectors = queries.count.div_ceil(LANES);
    let seen = view.seen(queries.count);
    for first in (0..seen).step_by(KEYS) {
        let count = KEYS.min(seen - first);
        score_chunk(simd, products, scratch, (first, count), (dim, view.scale));
        if let Some(own) = view.own
            && first + count > own + 1
        {
            hide_later_keys(simd, &mut scratch.scores, first, own);
        }
        update_softmax(simd, scratch, count);
        if P::PACKED == 2 {
            pack_weights(simd, products, &mut scratch.scores, count);
        }
        add_values(simd, products, scratch, (first, count), dim);
    }
    write(simd, scratch, dim, out, convert);
}
