//! Plan of a decode step's attention: the checked tables, cut into tasks for the threads.

use std::ops::Range;

use super::DecodeInputs;
use super::tables::{block_uses, prefix_blocks, rows_and_slots};
use crate::error::Result;

/// Smallest number of bytes of a key that a task reads, as long as a run can also be cut by rows. Every task that
/// touches a memory page has to look the page up again.
const MIN_KEY_BYTES: usize = 1024;
/// Largest number of query floats per task. Queries and outputs together take half of a small second-level cache.
const MAX_QUERY_FLOATS: usize = 16 * 1024;
/// Cost of reading a key from memory, in units of one dot product of a query with a cached key.
const MEMORY_READ_COST: usize = 4;

/// A checked decode step.
pub(super) struct Plan {
    /// Query rows, sorted so that rows with the same first block are neighbours.
    pub(super) rows: Vec<QueryRow>,
    /// Arena rows of the own keys that are visible.
    pub(super) slots: Vec<usize>,
    pub(super) uses: Vec<BlockUse>,
    pub(super) blocks: Vec<PrefixBlock>,
    /// Tasks, the most expensive first. Together they cover every pair of row and kv head once.
    pub(super) tasks: Vec<Task>,
}

/// A query row.
#[derive(Clone)]
pub(super) struct QueryRow {
    /// Index in the batch.
    pub(super) index: usize,
    /// Range in [`Plan::slots`].
    pub(super) slots: Range<usize>,
    /// Range in [`Plan::uses`], from left to right.
    pub(super) uses: Range<usize>,
}

/// A prefix block that a row sees.
#[derive(Clone, Copy)]
pub(super) struct BlockUse {
    pub(super) block: usize,
    /// First row of the block that the query sees. Earlier rows lie outside of its sliding window.
    pub(super) first: usize,
    /// Position of the block's first row relative to the query.
    pub(super) distance: i64,
}

/// A prefix block in the prefix tensor.
#[derive(Clone, Copy)]
pub(super) struct PrefixBlock {
    /// First row.
    pub(super) start: usize,
    /// Number of rows.
    pub(super) rows: usize,
}

/// Range of [`Plan::rows`] and range of kv heads that one thread processes together.
pub(super) struct Task {
    pub(super) rows: Range<usize>,
    pub(super) heads: Range<usize>,
    cost: usize,
}

impl Plan {
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if tables do not fit each other or name a row that does not exist.
    pub(super) fn new(inputs: &DecodeInputs<'_>, threads: usize) -> Result<Self> {
        let shape = inputs.shape;
        let row_floats = shape.kv_heads * shape.head_dim;
        let blocks = prefix_blocks(&inputs.tables, inputs.prefix.lens()[0] / row_floats)?;
        let arena_rows = inputs.own.lens()[0] / row_floats;
        let (mut rows, slots) = rows_and_slots(&inputs.tables, shape.rows, arena_rows, inputs.window)?;
        let uses = block_uses(&inputs.tables, &mut rows, &blocks, inputs.window)?;
        rows.sort_by(|a, b| {
            let blocks = |r: &QueryRow| uses[r.uses.clone()].iter().map(|u| u.block);
            blocks(a).cmp(blocks(b))
        });
        let mut plan = Self {
            rows,
            slots,
            uses,
            blocks,
            tasks: Vec::new(),
        };
        plan.make_tasks(inputs, threads);
        Ok(plan)
    }

    /// Cuts runs of rows with the same first block into as few tasks as balance the threads.
    ///
    /// A cut by kv heads copies no key twice. A cut by rows copies the shared block again for each part, so it is used
    /// only where heads do not suffice. With several runs, twice as many parts as threads leave room for runs that do
    /// not divide evenly.
    fn make_tasks(&mut self, inputs: &DecodeInputs<'_>, threads: usize) {
        let kv_heads = inputs.shape.kv_heads;
        let row_floats = inputs.shape.heads * inputs.shape.head_dim;
        let max_head_cuts =
            (kv_heads * inputs.shape.head_dim * inputs.own.element_size() / MIN_KEY_BYTES).clamp(1, kv_heads);
        let runs = self.runs();
        let total: usize = runs.iter().map(|(_, cost)| cost).sum();
        let parts = match (threads, runs.len()) {
            (1, _) => 1,
            (_, 1) => threads,
            _ => 2 * threads,
        };
        let max_cost = total.div_ceil(parts).max(1);
        for (run, cost) in runs {
            let pieces = cost
                .div_ceil(max_cost)
                .max((run.len() * row_floats).div_ceil(MAX_QUERY_FLOATS));
            let by_rows = pieces.div_ceil(max_head_cuts).min(run.len());
            let by_heads = pieces.div_ceil(by_rows).min(kv_heads);
            for rows in split_evenly(run, by_rows) {
                for heads in split_evenly(0..kv_heads, by_heads) {
                    self.tasks.push(Task {
                        rows: rows.clone(),
                        heads,
                        cost: cost / (by_rows * by_heads),
                    });
                }
            }
        }
        self.tasks.sort_by_key(|task| std::cmp::Reverse(task.cost));
    }

    /// Runs of rows with the same first block, and the cost of each run's keys. A row without blocks is a run of its
    /// own.
    pub(super) fn runs(&self) -> Vec<(Range<usize>, usize)> {
        let uses = |row: &QueryRow| &self.uses[row.uses.clone()];
        let mut runs: Vec<(Range<usize>, usize)> = Vec::with_capacity(self.rows.len());
        let mut before: &[BlockUse] = &[];
        for (i, row) in self.rows.iter().enumerate() {
            let own = uses(row);
            let continues = own
                .first()
                .is_some_and(|u| before.first().is_some_and(|b| b.block == u.block));
            let mut cost = MEMORY_READ_COST * row.slots.len();
            for (place, u) in own.iter().enumerate() {
                let rows = self.blocks[u.block].rows;
                // Rows of a run that see a block at the same place are neighbours and read it from memory once.
                let is_read = continues && before.get(place).is_some_and(|b| b.block == u.block);
                cost += rows - u.first + if is_read { 0 } else { MEMORY_READ_COST * rows };
            }
            match runs.last_mut() {
                Some((run, run_cost)) if continues => {
                    run.end += 1;
                    *run_cost += cost;
                }
                _ => runs.push((i..i + 1, cost)),
            }
            before = own;
        }
        runs
    }
}

/// Splits a range into `parts` ranges of nearly equal length.
fn split_evenly(range: Range<usize>, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let (start, length) = (range.start, range.len());
    (0..parts).map(move |i| start + i * length / parts..start + (i + 1) * length / parts)
}
