//! Number of keys and values that are read from memory.

use std::cell::Cell;
use std::collections::BTreeSet;

use super::case::Case;
use crate::attend::chunk::attend_chunk;
use crate::attend::in_place::ROWS_IN_PLACE;
use crate::attend::key_copy::{ChunkOffsets, KvMemory};
use crate::attend::plan::Plan;
use crate::attend::state::{BlockUser, TaskShape, TaskState};
use crate::attend::vector::{Element, LANES, Scalar, SimdOps};
use crate::error::Error;

thread_local! {
    static LOADS: Cell<usize> = const { Cell::new(0) };
}

/// A bf16 number whose loads are counted.
#[derive(Clone, Copy)]
struct Counted(u16);

impl Element for Counted {
    fn load<S: SimdOps>(simd: S, x: &[Self; LANES]) -> S::Vector {
        LOADS.set(LOADS.get() + 1);
        simd.load_bf16(&x.map(|x| x.0))
    }
    fn to_f32(self) -> f32 {
        self.0.to_f32()
    }
}

const HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const KEYS: usize = 24;

/// How often `rows` rows that see one chunk read each of its keys and values.
fn reads<S: SimdOps>(simd: S, rows: usize) -> usize {
    let stride = HEADS * HEAD_DIM;
    let numbers = vec![Counted(0x3f00); KEYS * stride];
    let memory = KvMemory {
        keys: numbers.as_slice().into(),
        values: numbers.as_slice().into(),
    };
    let shape = TaskShape {
        rows,
        heads: 0..HEADS,
        group_size: 1,
        head_dim: HEAD_DIM,
    };
    let (mut floats, mut softmax, mut queries) = (Vec::new(), Vec::new(), Vec::new());
    let mut state = TaskState::new(shape, (0.0, None), &mut floats, &mut softmax, &mut queries);
    let users: Vec<_> = (0..rows)
        .map(|row| BlockUser {
            place: 0,
            block: 0,
            row,
            first: 0,
            distance: 0,
        })
        .collect();
    let current: Vec<_> = (0..KEYS).map(|j| j * stride).collect();
    let offsets = ChunkOffsets {
        current: &current,
        next: &[],
    };
    LOADS.set(0);
    attend_chunk(simd, &mut state, memory, offsets, 0, &users);
    let once = 2 * KEYS * stride / LANES;
    assert!(LOADS.get().is_multiple_of(once), "{rows} rows: {} loads", LOADS.get());
    LOADS.get() / once
}

#[test]
fn rows_that_see_a_chunk_read_it_together() {
    for rows in 1..=9 {
        assert_eq!(reads(Scalar, rows), 1, "{rows} rows");
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = crate::attend::avx2::Avx2::new() {
            assert_eq!(reads(simd, rows), 1, "{rows} rows with avx2");
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = crate::attend::avx512::Avx512::new() {
            assert_eq!(
                reads(simd, rows),
                rows.div_ceil(ROWS_IN_PLACE),
                "{rows} rows with avx512"
            );
        }
    }
}

#[test]
fn beams_of_a_request_are_in_one_task_per_head() -> Result<(), Error> {
    // 8 requests with 4 beams each, whose rows alternate. The block of a request holds what its beams share.
    let number = |x: usize| i32::try_from(x).unwrap_or(i32::MAX);
    let (requests, kv_heads) = (8, 12);
    let rows = 4 * requests;
    let case = Case {
        block: (0..requests).map(|i| [number(40 * i), 40]).collect(),
        use_indptr: (0..=number(rows)).collect(),
        uses: (0..rows).map(|i| [number(i % requests), -40, 0]).collect(),
        lens: vec![0; rows],
        ..Case::shared(rows, (kv_heads, kv_heads, 64))
    };
    for threads in [1, 2, 4, 8] {
        let plan = Plan::new(&case.inputs(), threads)?;
        let mut keys_read = 0;
        for task in &plan.tasks {
            let uses = plan.rows[task.rows.clone()]
                .iter()
                .map(|row| &plan.uses[row.uses.clone()]);
            let blocks: BTreeSet<_> = uses.flatten().map(|u| u.block).collect();
            keys_read += task.heads.len() * blocks.iter().map(|b| plan.blocks[*b].rows).sum::<usize>();
        }
        assert_eq!(keys_read, kv_heads * requests * 40, "{threads} threads");
    }
    Ok(())
}
