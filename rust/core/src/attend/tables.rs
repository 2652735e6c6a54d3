//! Reading a step's tables: every entry is checked before it is used as a number of anything.

use super::Tables;
use super::plan::{Block, Row, Use};
use crate::error::{Error, Result};

/// A table's entry as a number below `end`.
fn number(value: i32, end: usize) -> Option<usize> {
    usize::try_from(value).ok().filter(|n| *n < end)
}

fn wrong<T>(text: &str) -> Result<T> {
    Err(Error::Config(format!(
        "decode tables: {text}; the tables and the arena are not of the same step"
    )))
}

/// The blocks, all within the prefix.
pub(super) fn blocks(tables: &Tables<'_>, prefix_rows: usize) -> Result<Vec<Block>> {
    let mut out = Vec::with_capacity(tables.block.len());
    for (c, [start, rows]) in tables.block.iter().enumerate() {
        match (usize::try_from(*start), usize::try_from(*rows)) {
            (Ok(start), Ok(rows)) if start.checked_add(rows).is_some_and(|end| end <= prefix_rows) => {
                out.push(Block { start, rows });
            }
            _ => {
                return wrong(&format!(
                    "block {c} has {rows} rows from {start} on, expected rows among the {prefix_rows} of the prefix"
                ));
            }
        }
    }
    Ok(out)
}

/// Every row with the blocks that it sees.
pub(super) fn uses(
    tables: &Tables<'_>,
    blocks: &[Block],
    num_rows: usize,
    window: usize,
) -> Result<(Vec<Row>, Vec<Use>)> {
    let Tables {
        user_indptr,
        user,
        user_pos,
        user_slides,
        ..
    } = *tables;
    let bounds: Option<Vec<usize>> = user_indptr.iter().map(|p| number(*p, user.len() + 1)).collect();
    let fits = |b: &Vec<usize>| {
        b.len() == blocks.len() + 1 && b.is_sorted() && user_pos.len() == user.len() && user_slides.len() == user.len()
    };
    let Some(bounds) = bounds.filter(fits) else {
        return wrong(&format!(
            "user_indptr {user_indptr:?} does not cut {} users of {} blocks",
            user.len(),
            blocks.len()
        ));
    };
    let used = bounds[0]..bounds[blocks.len()];
    let mut starts = vec![0; num_rows + 1];
    for (e, row) in user[used.clone()].iter().enumerate() {
        match number(*row, num_rows) {
            Some(row) => starts[row + 1] += 1,
            None => {
                return wrong(&format!("user {e} is row {row}, expected one of {num_rows}"));
            }
        }
    }
    for i in 0..num_rows {
        starts[i + 1] += starts[i];
    }
    let mut rows: Vec<Row> = (0..num_rows)
        .map(|i| Row {
            number: i,
            slots: 0..0,
            uses: starts[i]..starts[i],
        })
        .collect();
    let mut out = vec![Use { block: 0, first: 0 }; used.len()];
    for (c, block) in blocks.iter().enumerate() {
        for e in bounds[c]..bounds[c + 1] {
            let Some(row) = number(user[e], num_rows) else {
                continue;
            }; // checked above
            let uses = &mut rows[row].uses;
            out[uses.end] = Use {
                block: c,
                first: first_seen(user_pos[e], user_slides[e] != 0, window).min(block.rows),
            };
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
pub(super) fn slots(tables: &Tables<'_>, rows: &mut [Row], arena_rows: usize, window: usize) -> Result<Vec<usize>> {
    let [table_rows, columns, stride] = tables.table_shape;
    if tables.row.len() != rows.len() || tables.lens.len() != rows.len() {
        return wrong(&format!(
            "{} entries of row and {} of lens, expected {}",
            tables.row.len(),
            tables.lens.len(),
            rows.len()
        ));
    }
    let end = table_rows
        .checked_sub(1)
        .and_then(|last| last.checked_mul(stride)?.checked_add(columns));
    if end.is_none_or(|end| end > tables.table.len()) && !rows.is_empty() {
        return wrong(&format!(
            "a slot table of {} entries is too small for {table_rows} rows of {columns}, {stride} apart",
            tables.table.len()
        ));
    }
    let mut out = Vec::with_capacity(rows.len() * 64);
    for (i, row) in rows.iter_mut().enumerate() {
        let Some(at) = number(tables.row[i], table_rows) else {
            return wrong(&format!(
                "row {i} reads row {} of the slot table, expected one of {table_rows}",
                tables.row[i]
            ));
        };
        let Some(length) = number(tables.lens[i], columns + 1).filter(|n| *n > 0) else {
            return wrong(&format!("row {i} has {} keys, expected 1 to {columns}", tables.lens[i]));
        };
        let hidden = if window == 0 { 0 } else { length.saturating_sub(window) };
        let begin = out.len();
        for slot in &tables.table[at * stride..][hidden..length] {
            match number(*slot, arena_rows) {
                Some(slot) => out.push(slot),
                None => {
                    return wrong(&format!(
                        "row {i} has a key in arena row {slot}, expected one of {arena_rows}"
                    ));
                }
            }
        }
        row.slots = begin..out.len();
    }
    Ok(out)
}
