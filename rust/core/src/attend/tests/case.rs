//! Inputs for the tests, and an fp64 reference of the attention over them.

use std::mem::MaybeUninit;

use super::super::{
    Bias, DecodeInputs, DecodeOutputs, DecodeTables, Floats, FloatsMut, InstructionSet, KeysValues, Shape, decode,
};
use crate::error::Error;

/// Pseudo-random numbers from -1 to 1.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u16::try_from(state >> 48).map_or(0.0, |bits| f32::from(bits) / 32768.0 - 1.0)
    };
    (0..count).map(|_| next()).collect()
}

/// Memory of outputs. [`decode`] writes only initialized numbers to it.
pub(super) fn uninit(values: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    let start = values.as_mut_ptr().cast();
    // SAFETY: `MaybeUninit<f32>` has the layout of `f32`, and the result borrows `values` exclusively.
    unsafe { std::slice::from_raw_parts_mut(start, values.len()) }
}

/// Inputs of a decode step.
///
/// [`Case::new`] has rows of 70, 3 and 20 own keys in slots that ascend by 3, and blocks of 90 and 5 rows at rows 4 and
/// 100. Row 0 sees both blocks, row 1 none, and row 2 the first.
pub(super) struct Case {
    pub(super) shape: Shape,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) table: Vec<i32>,
    pub(super) row: Vec<i32>,
    pub(super) lens: Vec<i32>,
    pub(super) block: Vec<[i32; 2]>,
    pub(super) use_indptr: Vec<i32>,
    pub(super) uses: Vec<[i32; 3]>,
    pub(super) window: usize,
    pub(super) softcap: f32,
    /// Numbers of the position bias, empty for none.
    pub(super) bias: Vec<f32>,
    pub(super) max_distance: usize,
}

const ARENA_ROWS: usize = 400;
pub(super) const COLUMNS: usize = 80;

impl Case {
    pub(super) fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let size = ARENA_ROWS * kv_heads * head_dim;
        Self {
            shape: Shape {
                rows: 3,
                heads,
                kv_heads,
                head_dim,
            },
            q: random(3 * heads * head_dim, 1),
            k: random(size, 2),
            v: random(size, 3),
            table: (0..240).map(|i| 110 + (i * 3) % 290).collect(),
            row: vec![2, 0, 1],
            lens: vec![70, 3, 20],
            block: vec![[4, 90], [100, 5]],
            use_indptr: vec![0, 2, 2, 3],
            uses: vec![[0, -95, 1], [1, -5, 1], [0, -90, 0]],
            window: 0,
            softcap: 0.0,
            bias: Vec::new(),
            max_distance: 0,
        }
    }

    /// The same inputs with a random position bias.
    pub(super) fn with_bias(self, max_distance: usize) -> Self {
        Self {
            bias: random(self.shape.heads * (2 * max_distance + 1), 5),
            max_distance,
            ..self
        }
    }

    /// `rows` rows that all see the first block. Their own keys are those of the rows of [`Case::new`] in turn.
    pub(super) fn shared(rows: usize, (heads, kv_heads, head_dim): (usize, usize, usize)) -> Self {
        let base = Self::new(heads, kv_heads, head_dim);
        let number = |x: usize| i32::try_from(x).unwrap_or(i32::MAX);
        let each = |of: [i32; 3]| (0..rows).map(|i| of[i % 3]).collect::<Vec<_>>();
        let lens = each([70, 3, 20]);
        Self {
            shape: Shape { rows, ..base.shape },
            q: random(rows * heads * head_dim, 4),
            row: each([2, 0, 1]),
            use_indptr: std::iter::once(0).chain(2..number(rows) + 2).collect(),
            uses: [vec![[0, -95, 1], [1, -5, 1]], vec![[0, -95, 1]; rows - 1]].concat(),
            lens,
            ..base
        }
    }

    /// Row `i` in a batch of its own.
    pub(super) fn alone(&self, i: usize) -> Self {
        let numbers = self.shape.heads * self.shape.head_dim;
        let index = |x: i32| usize::try_from(x).unwrap_or(usize::MAX);
        let uses = &self.uses[index(self.use_indptr[i])..index(self.use_indptr[i + 1])];
        Self {
            shape: Shape { rows: 1, ..self.shape },
            q: self.q[i * numbers..][..numbers].to_vec(),
            k: self.k.clone(),
            v: self.v.clone(),
            table: self.table.clone(),
            row: vec![self.row[i]],
            lens: vec![self.lens[i]],
            block: self.block.clone(),
            use_indptr: vec![0, i32::try_from(uses.len()).unwrap_or(i32::MAX)],
            uses: uses.to_vec(),
            bias: self.bias.clone(),
            ..*self
        }
    }

    pub(super) fn inputs(&self) -> DecodeInputs<'_> {
        let memory = KeysValues::F32 {
            k: self.k.as_slice().into(),
            v: self.v.as_slice().into(),
        };
        let Shape { heads, head_dim, .. } = self.shape;
        DecodeInputs {
            shape: self.shape,
            q: Floats::F32(&self.q),
            q_strides: [heads * head_dim, head_dim],
            own: memory,
            prefix: memory,
            tables: DecodeTables {
                slot_table: &self.table,
                slot_table_shape: [3, COLUMNS, COLUMNS],
                row: &self.row,
                lens: &self.lens,
                block: &self.block,
                use_indptr: &self.use_indptr,
                uses: &self.uses,
            },
            scale: 0.3,
            window: self.window,
            softcap: self.softcap,
            bias: (!self.bias.is_empty()).then_some(Bias {
                table: &self.bias,
                max_distance: self.max_distance,
            }),
        }
    }

    pub(super) fn run(&self, threads: usize, instructions: InstructionSet) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let mut o = vec![7.0; self.q.len()];
        let mut lse = vec![7.0; self.shape.rows * self.shape.heads];
        let output = DecodeOutputs {
            o: FloatsMut::F32(uninit(&mut o)),
            lse: uninit(&mut lse),
        };
        let result = decode(&self.inputs(), output, threads, instructions);
        assert!(
            result.is_ok() || o.iter().chain(&lse).all(|x| x.to_bits() == 7.0_f32.to_bits()),
            "the outputs of a refused call were written to"
        );
        result.map(|()| (o, lse))
    }

    /// Arena rows that a query row sees and their positions relative to the query, in the order of the keys.
    fn visible_rows(&self, row: usize) -> Vec<(usize, i32)> {
        let mut out = Vec::new();
        let index = |x: i32| usize::try_from(x).unwrap_or(usize::MAX);
        for [block, pos, slides] in &self.uses[index(self.use_indptr[row])..index(self.use_indptr[row + 1])] {
            let [start, rows] = self.block[index(*block)];
            let hidden =
                |j: &i32| self.window > 0 && *slides == 1 && index(self.lens[row] - 1 - pos - j) >= self.window;
            let position = |j: i32| pos + j - (self.lens[row] - 1);
            out.extend(
                (0..rows)
                    .filter(|j| !hidden(j))
                    .map(|j| (index(start + j), position(j))),
            );
        }
        let length = index(self.lens[row]);
        let from = if self.window == 0 {
            0
        } else {
            length.saturating_sub(self.window)
        };
        out.extend(
            self.table[index(self.row[row]) * COLUMNS..][from..length]
                .iter()
                .zip((0..self.lens[row]).skip(from))
                .map(|(s, j)| (index(*s), j - (self.lens[row] - 1))),
        );
        out
    }

    /// Bias of a query head at a distance.
    fn bias_of(&self, head: usize, distance: i32) -> f64 {
        let furthest = i32::try_from(self.max_distance).unwrap_or(i32::MAX);
        let column = usize::try_from(distance.clamp(-furthest, furthest) + furthest).unwrap_or(usize::MAX);
        let row = self.bias.get(head * (2 * self.max_distance + 1)..).unwrap_or(&[]);
        row.get(column).copied().map_or(0.0, f64::from)
    }

    /// Largest difference of the outputs from an fp64 computation.
    pub(super) fn error(&self, o: &[f32], lse: &[f32]) -> f64 {
        let Shape {
            rows,
            heads,
            kv_heads,
            head_dim,
        } = self.shape;
        let mut worst = 0.0_f64;
        for (row, h) in (0..rows).flat_map(|row| (0..heads).map(move |h| (row, h))) {
            let query = &self.q[(row * heads + h) * head_dim..][..head_dim];
            let offset = |slot: usize| (slot * kv_heads + h / (heads / kv_heads)) * head_dim;
            let slots = self.visible_rows(row);
            let scores: Vec<f64> = slots
                .iter()
                .map(|(s, distance)| {
                    let dot: f64 = query
                        .iter()
                        .zip(&self.k[offset(*s)..])
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum();
                    let cap = f64::from(self.softcap);
                    if cap > 0.0 {
                        cap * (dot * f64::from(0.3_f32) / cap).tanh()
                    } else {
                        dot * f64::from(0.3_f32) + self.bias_of(h, *distance)
                    }
                })
                .collect();
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            worst = worst.max((f64::from(lse[row * heads + h]) - sum.ln()).abs());
            for d in 0..head_dim {
                let all: f64 = slots
                    .iter()
                    .zip(&scores)
                    .map(|((slot, _), s)| s.exp() * f64::from(self.v[offset(*slot) + d]))
                    .sum();
                worst = worst.max((f64::from(o[(row * heads + h) * head_dim + d]) - all / sum).abs());
            }
        }
        worst
    }
}
