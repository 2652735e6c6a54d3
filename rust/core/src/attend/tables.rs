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

/// Blocks that each row sees, from left to right. Sets the range of each row in the result.
pub(super) fn block_uses(
    tables: &DecodeTables<'_>,
    rows: &mut [QueryRow],
    blocks: &[PrefixBlock],
    window: usize,
) -> Result<Vec<BlockUse>> {
    let DecodeTables {
        use_indptr, uses, lens, ..
    } = *tables;
    let borders: Option<Vec<usize>> = use_indptr.iter().map(|p| index_below(*p, uses.len() + 1)).collect();
    let Some(borders) = borders.filter(|b| b.len() == rows.len() + 1 && b.is_sorted()) else {
        return mismatch(&format!(
            "use_indptr {use_indptr:?} does not cut {} uses of {} rows",
            uses.len(),
            rows.len()
        ));
    };
    let mut out = Vec::with_capacity(uses.len());
    for (i, row) in rows.iter_mut().enumerate() {
        let begin = out.len();
        for [block, pos, slides] in &uses[borders[i]..borders[i + 1]] {
            let Some(block) = index_below(*block, blocks.len()) else {
                return mismatch(&format!("row {i} sees block {block}, expected one of {}", blocks.len()));
            };
            let pos = i64::from(*pos) + 1 - i64::from(lens[i]);
            out.push(BlockUse {
                block,
                first: first_visible(pos, *slides != 0, window).min(blocks[block].rows),
                distance: pos,
            });
        }
        if lens[i] == 0 && out.len() == begin {
            return mismatch(&format!(
                "row {i} has 0 keys and sees no block, expected one of the two"
            ));
        }
        row.uses = begin..out.len();
    }
    Ok(out)
}

/// First row of a block that lies within the query's window.
///
/// * `pos`: position of the block's first row relative to the query.
fn first_visible(pos: i64, slides: bool, window: usize) -> usize {
    if window == 0 || !slides {
        return 0;
    }
    let hidden = 1 - pos - i64::try_from(window).unwrap_or(i64::MAX / 2);
    usize::try_from(hidden).unwrap_or(0)
}

/// All query rows, and the arena rows of the own keys that they see. Uses are added by [`block_uses`].
pub(super) fn rows_and_slots(
    tables: &DecodeTables<'_>,
    num_rows: usize,
    arena_rows: usize,
    window: usize,
) -> Result<(Vec<QueryRow>, Vec<usize>)> {
    let [table_rows, columns, stride] = tables.slot_table_shape;
    if tables.row.len() != num_rows || tables.lens.len() != num_rows {
        return mismatch(&format!(
            "{} entries of row and {} of lens, expected {num_rows}",
            tables.row.len(),
            tables.lens.len()
        ));
    }
    let end = table_rows
        .checked_sub(1)
        .and_then(|last| last.checked_mul(stride)?.checked_add(columns));
    if end.is_none_or(|end| end > tables.slot_table.len()) && num_rows > 0 {
        return mismatch(&format!(
            "a slot table of {} entries is too small for {table_rows} rows of {columns}, {stride} apart",
            tables.slot_table.len()
        ));
    }
    let (mut rows, mut out) = (Vec::with_capacity(num_rows), Vec::with_capacity(num_rows * 64));
    for i in 0..num_rows {
        let Some(table_row) = index_below(tables.row[i], table_rows) else {
            return mismatch(&format!(
                "row {i} reads row {} of the slot table, expected one of {table_rows}",
                tables.row[i]
            ));
        };
        let Some(length) = index_below(tables.lens[i], columns + 1) else {
            return mismatch(&format!("row {i} has {} keys, expected 0 to {columns}", tables.lens[i]));
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
        rows.push(QueryRow {
            index: i,
            slots: begin..out.len(),
            uses: 0..0,
        });
    }
    Ok((rows, out))
}
