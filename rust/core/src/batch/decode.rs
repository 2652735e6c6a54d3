//! Work tables of a decode step's attention, and the padding of a step's tables to fixed sizes.
//!
//! The kernel runs one program per work item and kv head. An item is either a range of a prefix block for a group of
//! rows, or a range of the keys that one row reads alone (`work`).

mod work;

use super::int32::to_i32;
use super::table_buffer::TableBuffer;
use work::{StepView, WorkTables};

/// Tile size and cost model of decode attention.
///
/// All costs are bytes of one kv head, so that the start of a program and a launch compare with reading keys. The
/// fields are those of `DecodeSizes` in the Python package `prefixfast_kernels`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DecodeSizes {
    /// Largest number of rows in the tile of a group. 0 disables the work tables.
    pub users: usize,
    /// Number of work items that occupy the device, at least 1.
    pub fill: usize,
    /// Bytes of the key and the value of one row.
    pub key_bytes: usize,
    /// Bytes of a partial sum of one row, written and read.
    pub part_bytes: usize,
    /// Bytes that could have been read while a work item starts.
    pub item_bytes: usize,
    /// Bytes that could have been read during the launch that merges partial sums.
    pub launch_bytes: usize,
    /// Whether to pad the step's tables to sizes that depend only on the next power of two of its rows and on the
    /// largest number of prefixes of a request.
    pub padded: bool,
}

/// Table entries of a padding row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PaddingRow {
    /// Row of the slot table that no request uses.
    pub(crate) row: usize,
    /// Scratch slot in the arena, which the row's only key goes to.
    pub(crate) slot: usize,
}

/// Upper bounds of the sizes of a decode step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepBounds {
    pub(crate) rows: usize,
    /// Blocks that a row sees.
    pub(crate) blocks: usize,
}

impl DecodeSizes {
    /// Upper bounds of the numbers of work items and partial sums in a step of `rows` rows that see at most
    /// `blocks` blocks each.
    ///
    /// A block has at most two thirds as many tiles as users, because a tile of one row saves nothing and is not
    /// grouped. Splits add at most `fill` items.
    pub(crate) fn capacity(&self, rows: usize, blocks: usize) -> (usize, usize) {
        if self.users == 0 {
            return (0, 0);
        }
        let uses = rows.saturating_mul(blocks);
        let items = rows.saturating_add(uses - uses / 3).saturating_add(self.fill);
        let parts = uses
            .saturating_add(rows)
            .saturating_add(self.fill.saturating_mul(1 + self.users.min(rows)));
        (items, parts)
    }

    /// Upper bound of the int32 entries of the work tables.
    pub(crate) fn max_entries(&self, rows: usize, blocks: usize) -> usize {
        let (items, parts) = self.capacity(rows, blocks);
        [items.saturating_mul(6), parts, rows.saturating_mul(blocks), rows + 1]
            .into_iter()
            .fold(0, usize::saturating_add)
    }
}

/// Adds `work`, `grouped`, `part_indptr` and `part` to the tables of a decode step, and pads all tables if
/// [`DecodeSizes::padded`] is set.
///
/// The sections of `tables` are those of this step alone.
pub(crate) fn push_decode_work(tables: &mut TableBuffer, sizes: &DecodeSizes, bounds: StepBounds, padding: PaddingRow) {
    let rows = tables.get("row").map_or(0, <[i32]>::len);
    let padded_rows = (sizes.padded && sizes.users > 0).then(|| rows.next_power_of_two().min(bounds.rows));
    if let Some(rows) = padded_rows {
        pad_tables(tables, rows, rows * bounds.blocks, padding);
    }
    let mut work = if sizes.users == 0 {
        WorkTables::default()
    } else {
        let get = |name| tables.get(name).unwrap_or(&[]);
        sizes.work_tables(&StepView {
            lens: get("lens"),
            use_indptr: get("use_indptr"),
            uses: get("use").as_chunks().0,
            blocks: get("block").as_chunks().0,
            user_indptr: get("user_indptr"),
            user: get("user"),
        })
    };
    if let Some(rows) = padded_rows {
        let (items, parts) = sizes.capacity(rows, bounds.blocks);
        work.items.resize(items, [-1, 0, 0, 0, 0, -1]);
        work.parts.resize(parts, 0);
    }
    tables.push_rows("work", work.items);
    tables.push("grouped", work.grouped);
    tables.push("part_indptr", work.part_indptr);
    tables.push("part", work.parts);
}

/// Rewrites the tables with room for `rows` rows and `uses` block uses. Each new row is a padding row with one key.
fn pad_tables(tables: &mut TableBuffer, rows: usize, uses: usize, padding: PaddingRow) {
    let sections = std::mem::take(&mut tables.sections);
    let start = sections.first().map_or(0, |section| section.offset);
    let old = tables.data.split_off(start);
    for section in &sections {
        let values = &old[section.offset - start..][..section.len()];
        let last = values.last().copied().unwrap_or(0);
        let (count, value) = match section.name {
            "row" => (rows, to_i32(padding.row)),
            "slot" => (rows, to_i32(padding.slot)),
            "lens" => (rows, 1),
            "position_ids" => (rows, 0),
            "use_indptr" => (rows + 1, last),
            "user_indptr" => (uses + 1, last),
            _ => (uses, 0),
        };
        let offset = tables.begin();
        tables.data.extend_from_slice(values);
        tables.data.resize(offset + count * section.cols.max(1), value);
        tables.end(section.name, offset, section.cols);
    }
}
