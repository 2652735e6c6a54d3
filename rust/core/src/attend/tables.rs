//! Reader of a decode step's tables. Every entry is checked before it is used as an index.

use super::DecodeTables;
use super::plan::{BlockUse, PrefixBlock, QueryRow};
use crate::error::{Error, Result};

/// `value` as an index, if it is from 0 to `end - 1`.
fn index_below(value: i32, end: usize) -> Option<usize> {
    usize::try_from(value).ok().filter(|n| *n < end)
}

fn mismatch<T>(text: &str) -> Result<T> {
    Err(Error::Config(format!(
        "decode tables: {text}; the tables and the arena are not of the same step"
    )))
}

/// The prefix blocks, all of which lie within the `prefix_rows` rows of the prefix tensor.
pub(super) fn prefix_blocks(tables: &DecodeTables<'_>, prefix_rows: usize) -> Result<Vec<PrefixBlock>> {
    let mut out = Vec::with_capacity(tables.block.len());
    for (c, [start, rows]) in tables.block.iter().enumerate() {
        match (usize::try_from(*start), usize::try_from(*rows)) {
            (Ok(start), Ok(rows)) if start.checked_add(rows).is_some_and(|end| end <= prefix_rows) => {
                out.push(PrefixBlock { start, rows });
            }
            _ => {
                return mismatch(&format!(
                    "block {c} has {rows} rows from {start} on, expected rows among the {prefix_rows} of the prefix"
                ));
            }
        }
    }
    Ok(out)
}

/// All query rows, each with the range of its block uses. Slots are added by [`own_slots`].
pub(super) fn rows_and_uses(
    tables: &DecodeTables<'_>,
    blocks: &[PrefixBlock],
    num_rows: usize,
    window: usize,
) -> Result<(Vec<QueryRow>, Vec<BlockUse>)> {
    let DecodeTables {
        user_indptr,
        user,
        user_pos,
        user_slides,
        ..
    } = *tables;
    let borders: Option<Vec<usize>> = user_indptr.iter().map(|p| index_below(*p, user.len() + 1)).collect();
    let fits = |b: &Vec<usize>| {
        b.len() == blocks.len() + 1 && b.is_sorted() && user_pos.len() == user.len() && user_slides.len() == user.len()
    };
    let Some(borders) = borders.filter(fits) else {
        return mismatch(&format!(
            "user_indptr {user_indptr:?} does not cut {} users of {} blocks",
            user.len(),
            blocks.len()
        ));
    };
    let used = borders[0]..borders[blocks.len()];
    let mut starts = vec![0; num_rows + 1];
    for (e, row) in user[used.clone()].iter().enumerate() {
        match index_below(*row, num_rows) {
            Some(row) => starts[row + 1] += 1,
            None => return mismatch(&format!("user {e} is row {row}, expected one of {num_rows}")),
        }
    }
    for i in 0..num_rows {
        starts[i + 1] += starts[i];
    }
    let mut rows: Vec<QueryRow> = (0..num_rows)
        .map(|i| QueryRow {
            index: i,
            slots: 0..0,
            uses: starts[i]..starts[i],
        })
        .collect();
    let mut out = vec![BlockUse { block: 0, first: 0 }; used.len()];
    for (c, block) in blocks.iter().enumerate() {
        for e in borders[c]..borders[c + 1] {
            // The loop above has refused entries out of range.
            let Some(row) = index_below(user[e], num_rows) else {
                continue;
            };
            let uses = &mut rows[row].uses;
            out[uses.end] = BlockUse {
                block: c,
                first: first_visible(user_pos[e], user_slides[e] != 0, window).min(block.rows),
            };
            uses.end += 1;
        }
    }
    Ok((rows, out))
}

/// First row of a block that lies within the query's window.
///
/// * `pos`: position of the block's first row relative to the query.
fn first_visible(pos: i32, slides: bool, window: usize) -> usize {
    if window == 0 || !slides {
        return 0;
    }
    let hidden = 1 - i64::from(pos) - i64::try_from(window).unwrap_or(i64::MAX / 2);
    usize::try_from(hidden).unwrap_or(0)
}

/// Arena rows of the own keys that each row sees. Sets the range of each row in the result.
pub(super) fn own_slots(
    tables: &DecodeTables<'_>,
    rows: &mut [QueryRow],
    arena_rows: usize,
    window: usize,
) -> Result<Vec<usize>> {
    let [table_rows, columns, stride] = tables.slot_table_shape;
    if tables.row.len() != rows.len() || tables.lens.len() != rows.len() {
        return mismatch(&format!(
            "{} entries of row and {} of lens, expected {}",
            tables.row.len(),
            tables.lens.len(),
            rows.len()
        ));
    }
    let end = table_rows
        .checked_sub(1)
        .and_then(|last| last.checked_mul(stride)?.checked_add(columns));
    if end.is_none_or(|end| end > tables.slot_table.len()) && !rows.is_empty() {
        return mismatch(&format!(
            "a slot table of {} entries is too small for {table_rows} rows of {columns}, {stride} apart",
            tables.slot_table.len()
        ));
    }
    let mut out = Vec::with_capacity(rows.len() * 64);
    for (i, row) in rows.iter_mut().enumerate() {
        let Some(table_row) = index_below(tables.row[i], table_rows) else {
            return mismatch(&format!(
                "row {i} reads row {} of the slot table, expected one of {table_rows}",
                tables.row[i]
            ));
        };
        let Some(length) = index_below(tables.lens[i], columns + 1).filter(|n| *n > 0) else {
            return mismatch(&format!("row {i} has {} keys, expected 1 to {columns}", tables.lens[i]));
        };
        let hidden = if window == 0 { 0 } else { length.saturating_sub(window) };
        let begin = out.len();
        for slot in &tables.slot_table[table_row * stride..][hidden..length] {
            match index_below(*slot, arena_rows) {
                Some(slot) => out.push(slot),
                None => {
                    return mismatch(&format!(
                        "row {i} has a key in arena row {slot}, expected one of {arena_rows}"
                    ));
                }
            }
        }
        row.slots = begin..out.len();
    }
    Ok(out)
}
