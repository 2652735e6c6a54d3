//! What a step's tables ask for, checked and cut into tasks.

use std::ops::Range;

use super::{Problem, Tables};
use crate::error::{Error, Result};

/// Tasks for each thread: enough that the last ones even the threads out.
const TASKS: usize = 4;
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
        let slots = slots(&problem.tables, &mut rows, problem.own.lens()[0] / numbers, problem.window)?;
        rows.sort_by(|a, b| {
            let names = |r: &Row| uses[r.uses.clone()].iter().map(|u| u.block);
            names(a).cmp(names(b))
        });
        let mut plan = Self { rows, slots, uses, blocks, tasks: Vec::new() };
        plan.cut(shape.kv_heads, shape.heads / shape.kv_heads * shape.head_dim, threads);
        Ok(plan)
    }

    /// Makes the tasks: a run of rows with the same first block is cut by kv heads (which costs nothing), then by rows (which reads the block again).
    fn cut(&mut self, kv_heads: usize, floats: usize, threads: usize) {
        let mut runs: Vec<(Range<usize>, usize)> = Vec::new();
        for (i, row) in self.rows.iter().enumerate() {
            let first = |r: &Row| self.uses[r.uses.clone()].first().map(|u| u.block);
            let own = FROM_MEMORY * row.slots.len() + self.uses[row.uses.clone()].iter().map(|u| self.blocks[u.block].rows - u.first).sum::<usize>();
            match runs.last_mut() {
                Some((run, cost)) if first(row).is_some() && first(row) == first(&self.rows[run.start]) => {
                    run.end += 1;
                    *cost += own;
                }
                _ => {
                    let read = self.uses[row.uses.clone()].iter().map(|u| self.blocks[u.block].rows).sum::<usize>();
                    runs.push((i..i + 1, own + FROM_MEMORY * read));
                }
            }
        }
        let total: usize = runs.iter().map(|(_, cost)| cost).sum();
        let most = if threads > 1 { total.div_ceil(TASKS * threads).max(1) } else { total.max(1) };
        for (run, cost) in runs {
            let pieces = cost.div_ceil(most).max((run.len() * kv_heads * floats).div_ceil(MOST_FLOATS));
            let by_heads = pieces.clamp(1, kv_heads);
            let by_rows = pieces.div_ceil(by_heads).clamp(1, run.len());
            for r in even(run, by_rows) {
                for heads in even(0..kv_heads, by_heads) {
                    self.tasks.push(Task { rows: r.clone(), heads, cost: cost / (by_rows * by_heads) });
                }
            }
        }
        self.tasks.sort_by_key(|task| std::cmp::Reverse(task.cost));
    }
}

/// A range in some parts of nearly equal length.
fn even(range: Range<usize>, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let (start, length) = (range.start, range.len());
    (0..parts).map(move |i| start + i * length / parts..start + (i + 1) * length / parts)
}

/// A table's entry as a number below `end`.
fn number(value: i32, end: usize) -> Option<usize> {
    usize::try_from(value).ok().filter(|n| *n < end)
}

fn wrong<T>(text: String) -> Result<T> {
    Err(Error::Config(format!("decode tables: {text}; the tables and the arena are not of the same step")))
}

/// The blocks, all within the prefix.
fn blocks(tables: &Tables<'_>, prefix_rows: usize) -> Result<Vec<Block>> {
    let mut out = Vec::with_capacity(tables.block.len());
    for (c, [start, rows]) in tables.block.iter().enumerate() {
        match (usize::try_from(*start), usize::try_from(*rows)) {
            (Ok(start), Ok(rows)) if start.checked_add(rows).is_some_and(|end| end <= prefix_rows) => out.push(Block { start, rows }),
            _ => return wrong(format!("block {c} has {rows} rows from {start} on, expected rows among the {prefix_rows} of the prefix")),
        }
    }
    Ok(out)
}

/// Every row with the blocks that it sees.
fn uses(tables: &Tables<'_>, blocks: &[Block], num_rows: usize, window: usize) -> Result<(Vec<Row>, Vec<Use>)> {
    let Tables { user_indptr, user, user_pos, user_slides, .. } = *tables;
    let bounds: Option<Vec<usize>> = user_indptr.iter().map(|p| number(*p, user.len() + 1)).collect();
    let fits = |b: &Vec<usize>| b.len() == blocks.len() + 1 && b.is_sorted() && user_pos.len() == user.len() && user_slides.len() == user.len();
    let Some(bounds) = bounds.filter(fits) else {
        return wrong(format!("user_indptr {user_indptr:?} does not cut {} users of {} blocks", user.len(), blocks.len()));
    };
    let used = bounds[0]..bounds[blocks.len()];
    let mut starts = vec![0; num_rows + 1];
    for (e, row) in user[used.clone()].iter().enumerate() {
        match number(*row, num_rows) {
            Some(row) => starts[row + 1] += 1,
            None => return wrong(format!("user {e} is row {row}, expected one of {num_rows}")),
        }
    }
    for i in 0..num_rows {
        starts[i + 1] += starts[i];
    }
    let mut rows: Vec<Row> = (0..num_rows).map(|i| Row { number: i, slots: 0..0, uses: starts[i]..starts[i] }).collect();
    let mut out = vec![Use { block: 0, first: 0 }; used.len()];
    for (c, block) in blocks.iter().enumerate() {
        for e in bounds[c]..bounds[c + 1] {
            let Some(row) = number(user[e], num_rows) else { continue }; // checked above
            let uses = &mut rows[row].uses;
            out[uses.end] = Use { block: c, first: first_seen(user_pos[e], user_slides[e] != 0, window).min(block.rows) };
            uses.end += 1;
        }
    }
    Ok((rows, out))
}

/// The first row that a query sees of a block whose first row lies at `pos` relative to it: that at a distance below the window.
fn first_seen(pos: i32, slides: bool, window: usize) -> usize {
    if window == 0 || !slides {
        return 0;
    }
    let hidden = 1 - i64::from(pos) - i64::try_from(window).unwrap_or(i64::MAX / 2);
    usize::try_from(hidden).unwrap_or(0)
}

/// Arena rows of the own keys that each row sees.
fn slots(tables: &Tables<'_>, rows: &mut [Row], arena_rows: usize, window: usize) -> Result<Vec<usize>> {
    let [table_rows, columns, stride] = tables.table_shape;
    if tables.row.len() != rows.len() || tables.lens.len() != rows.len() {
        return wrong(format!("{} entries of row and {} of lens, expected {}", tables.row.len(), tables.lens.len(), rows.len()));
    }
    let end = table_rows.checked_sub(1).and_then(|last| last.checked_mul(stride)?.checked_add(columns));
    if end.is_none_or(|end| end > tables.table.len()) && !rows.is_empty() {
        return wrong(format!("a slot table of {} entries is too small for {table_rows} rows of {columns}, {stride} apart", tables.table.len()));
    }
    let mut out = Vec::with_capacity(rows.len() * 64);
    for (i, row) in rows.iter_mut().enumerate() {
        let Some(at) = number(tables.row[i], table_rows) else {
            return wrong(format!("row {i} reads row {} of the slot table, expected one of {table_rows}", tables.row[i]));
        };
        let Some(length) = number(tables.lens[i], columns + 1).filter(|n| *n > 0) else {
            return wrong(format!("row {i} has {} keys, expected 1 to {columns}", tables.lens[i]));
        };
        let hidden = if window == 0 { 0 } else { length.saturating_sub(window) };
        let begin = out.len();
        for slot in &tables.table[at * stride..][hidden..length] {
            match number(*slot, arena_rows) {
                Some(slot) => out.push(slot),
                None => return wrong(format!("row {i} has a key in arena row {slot}, expected one of {arena_rows}")),
            }
        }
        row.slots = begin..out.len();
    }
    Ok(out)
}
