//! What a step's tables ask for, checked and cut into tasks.

use std::ops::Range;

use super::Problem;
use super::tables::{blocks, slots, uses};
use crate::error::Result;

/// Bytes of a key that a task reads at least, if there are other ways to cut: a page that many tasks touch is looked up by each of them.
const BYTES: usize = 1024;
/// Most floats of the queries of one task: queries and outputs together take half of a small second-level cache.
const MOST_FLOATS: usize = 16 * 1024;
/// Cost of a key that comes from memory, in products of a cached key and a query.
const FROM_MEMORY: usize = 4;

/// A checked step.
pub(super) struct Plan {
    /// Rows, those with the same first block together.
    pub(super) rows: Vec<Row>,
    /// Arena rows of own keys that are seen.
    pub(super) slots: Vec<usize>,
    pub(super) uses: Vec<Use>,
    pub(super) blocks: Vec<Block>,
    /// Together every (row, kv head) once; the longest first.
    pub(super) tasks: Vec<Task>,
}

/// A query row.
#[derive(Clone)]
pub(super) struct Row {
    /// Its number in the batch.
    pub(super) number: usize,
    /// Its part of `slots`.
    pub(super) slots: Range<usize>,
    /// Its part of `uses`, by block.
    pub(super) uses: Range<usize>,
}

/// A block that a row sees from its row `first` on.
#[derive(Clone, Copy)]
pub(super) struct Use {
    pub(super) block: usize,
    pub(super) first: usize,
}

/// A prefix block: its first row and number of rows.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) start: usize,
    pub(super) rows: usize,
}

/// Some kv heads of some entries of [`Plan::rows`].
pub(super) struct Task {
    pub(super) rows: Range<usize>,
    pub(super) heads: Range<usize>,
    cost: usize,
}

impl Plan {
    /// # Errors
    /// [`Error::Config`] if tables do not fit each other, or name a row that does not exist.
    pub(super) fn new(problem: &Problem<'_>, threads: usize) -> Result<Self> {
        let shape = problem.shape;
        let numbers = shape.kv_heads * shape.head_dim;
        let blocks = blocks(&problem.tables, problem.prefix.lens()[0] / numbers)?;
        let (mut rows, uses) = uses(&problem.tables, &blocks, shape.rows, problem.window)?;
        let slots = slots(
            &problem.tables,
            &mut rows,
            problem.own.lens()[0] / numbers,
            problem.window,
        )?;
        rows.sort_by(|a, b| {
            let names = |r: &Row| uses[r.uses.clone()].iter().map(|u| u.block);
            names(a).cmp(names(b))
        });
        let mut plan = Self {
            rows,
            slots,
            uses,
            blocks,
            tasks: Vec::new(),
        };
        plan.cut(problem, threads);
        Ok(plan)
    }

    /// Makes the tasks, no more than even the threads out, with room for runs that do not divide evenly: a run of rows with the same first block is cut by kv heads, which copies nothing twice, and by
    /// rows, which copies the block again.
    fn cut(&mut self, problem: &Problem<'_>, threads: usize) {
        let kv_heads = problem.shape.kv_heads;
        let floats = problem.shape.heads * problem.shape.head_dim;
        let wide = (kv_heads * problem.shape.head_dim * problem.own.width() / BYTES).clamp(1, kv_heads);
        let runs = self.runs();
        let total: usize = runs.iter().map(|(_, cost)| cost).sum();
        let parts = match (threads, runs.len()) {
            (1, _) => 1,
            (_, 1) => threads,
            _ => 2 * threads,
        };
        let most = total.div_ceil(parts).max(1);
        for (run, cost) in runs {
            let pieces = cost.div_ceil(most).max((run.len() * floats).div_ceil(MOST_FLOATS));
            let by_rows = pieces.div_ceil(wide).min(run.len());
            let by_heads = pieces.div_ceil(by_rows).min(kv_heads);
            for rows in even(run, by_rows) {
                for heads in even(0..kv_heads, by_heads) {
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

    /// Rows with the same first block and the cost of their keys; rows without blocks alone.
    fn runs(&self) -> Vec<(Range<usize>, usize)> {
        let uses = |row: &Row| &self.uses[row.uses.clone()];
        let mut runs: Vec<(Range<usize>, usize)> = Vec::with_capacity(self.rows.len());
        for (i, row) in self.rows.iter().enumerate() {
            let mut cost = FROM_MEMORY * row.slots.len()
                + uses(row)
                    .iter()
                    .map(|u| self.blocks[u.block].rows - u.first)
                    .sum::<usize>();
            let first = uses(row).first().map(|u| u.block);
            match runs.last_mut() {
                Some((run, all))
                    if first.is_some() && first == uses(&self.rows[run.start]).first().map(|u| u.block) =>
                {
                    run.end += 1;
                    *all += cost;
                }
                _ => {
                    cost += FROM_MEMORY * uses(row).iter().map(|u| self.blocks[u.block].rows).sum::<usize>();
                    runs.push((i..i + 1, cost));
                }
            }
        }
        runs
    }
}

/// A range in some parts of nearly equal length.
fn even(range: Range<usize>, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let (start, length) = (range.start, range.len());
    (0..parts).map(move |i| start + i * length / parts..start + (i + 1) * length / parts)
}
