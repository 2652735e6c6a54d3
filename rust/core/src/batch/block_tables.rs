//! Block tables: which query rows see which prefix blocks. Packed forwards and decode steps share them.

use super::int32::{to_i32, to_usize};
use super::place::Place;
use super::table_buffer::TableBuffer;

/// Rows of one prefix in the tensor of keys that the kernels read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PrefixBlock {
    /// Prefix number.
    pub(crate) prefix: i64,
    /// First row in the tensor.
    pub(crate) first: i32,
    /// Number of rows, at least 1.
    pub(crate) rows: i32,
    /// 1 if the sliding window slides over the block, else 0.
    pub(crate) slides: i32,
    /// Place of the prefix.
    pub(crate) place: Place,
    /// Layer set of the prefix, as numbered by the scheduler.
    pub(crate) layer_set: usize,
}

/// A run of consecutive query rows that see the same blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueryRun<'a> {
    /// First query row.
    pub(crate) first: i32,
    /// Number of query rows.
    pub(crate) rows: i32,
    /// Position of the first query row relative to key 0.
    pub(crate) position: i32,
    /// Blocks from left to right. The last one ends right before key 0.
    pub(crate) blocks: &'a [PrefixBlock],
}

/// Entry of table `use`: index of the block in table `block`, position of its first row relative to key 0, slides.
type BlockUse = [i32; 3];

/// Adds `use_indptr`, `use`, `block`, `user_indptr`, `user`, `user_pos`, `user_slides` and `span`.
pub(crate) fn push_block_tables(tables: &mut TableBuffer, queries: &[QueryRun<'_>]) {
    let blocks = distinct_blocks(queries);
    let uses = block_uses(queries, &blocks);
    tables.push_indptr("use_indptr", queries.iter().map(|run| run.blocks.len()));
    tables.push_rows("use", uses.iter().copied());
    tables.push_rows("block", blocks.iter().map(|block| [block.first, block.rows]));
    push_users(tables, queries, &uses, blocks.len());
}

/// Blocks in use, each once, in ascending order of the prefix number.
fn distinct_blocks(queries: &[QueryRun<'_>]) -> Vec<PrefixBlock> {
    let mut blocks: Vec<PrefixBlock> = Vec::new();
    let mut last: &[PrefixBlock] = &[];
    for run in queries {
        if run.blocks != last {
            last = run.blocks;
            blocks.extend(last);
        }
    }
    blocks.sort_unstable_by_key(|block| block.prefix);
    blocks.dedup_by_key(|block| block.prefix);
    blocks
}

fn block_uses(queries: &[QueryRun<'_>], blocks: &[PrefixBlock]) -> Vec<BlockUse> {
    let mut uses: Vec<BlockUse> = Vec::new();
    let mut last: &[PrefixBlock] = &[];
    for run in queries {
        let count = run.blocks.len();
        if run.blocks == last {
            // Neighbouring runs mostly see the same blocks.
            uses.extend_from_within(uses.len() - count..);
            continue;
        }
        last = run.blocks;
        let mut position: i32 = -last.iter().map(|block| block.rows).sum::<i32>();
        for block in last {
            let number = blocks.partition_point(|other| other.prefix < block.prefix);
            uses.push([to_i32(number), position, block.slides]);
            position += block.rows;
        }
    }
    uses
}

/// Adds the inverse of `uses`: the query rows of each block in ascending order, so that a sum over them has a fixed
/// order.
fn push_users(tables: &mut TableBuffer, queries: &[QueryRun<'_>], uses: &[BlockUse], num_blocks: usize) {
    let mut counts = vec![0_usize; num_blocks];
    let mut at = 0;
    for run in queries {
        for [block, ..] in &uses[at..at + run.blocks.len()] {
            counts[to_usize(*block)] += to_usize(run.rows);
        }
        at += run.blocks.len();
    }
    tables.push_indptr("user_indptr", counts.iter().copied());
    let mut next: Vec<usize> = counts
        .iter()
        .scan(0, |sum, count| {
            *sum += count;
            Some(*sum - count)
        })
        .collect();
    let total = counts.iter().sum();
    let mut entries = vec![[0_i32; 3]; total];
    let mut at = 0;
    for run in queries {
        for row in 0..run.rows {
            for [block, position, slides] in &uses[at..at + run.blocks.len()] {
                let index = &mut next[to_usize(*block)];
                entries[*index] = [run.first + row, position - run.position - row, *slides];
                *index += 1;
            }
        }
        at += run.blocks.len();
    }
    for (column, name) in ["user", "user_pos", "user_slides"].into_iter().enumerate() {
        tables.push(name, entries.iter().map(|entry| entry[column]));
    }
    let spans = counts
        .iter()
        .zip(&next)
        .map(|(count, end)| span(&entries[end - count..*end]));
    tables.push_rows("span", spans);
}

/// First query row, number of query rows, and 1 if the rows are consecutive, else 0.
fn span(users: &[[i32; 3]]) -> [i32; 3] {
    let consecutive = users.windows(2).all(|pair| pair[1][0] == pair[0][0] + 1);
    [
        users.first().map_or(0, |user| user[0]),
        to_i32(users.len()),
        i32::from(consecutive),
    ]
}
