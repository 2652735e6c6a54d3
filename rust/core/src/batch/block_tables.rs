//! Which queries see which prefix blocks: the tables that a packed forward and a decode step share.

use super::int32::{index, int};
use super::table_buffer::Tables;

/// A prefix block where it lies in the tensor of the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    /// Number of the prefix.
    pub(crate) prefix: i64,
    /// First row in the prefix tensor.
    pub(crate) first: i32,
    /// Number of rows, at least 1.
    pub(crate) rows: i32,
    /// 1 if the attention window slides over it, else 0.
    pub(crate) slides: i32,
    /// Which set of layers it lies in; the scheduler knows them.
    pub(crate) set: usize,
}

/// A run of query rows that see the same blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// First query row.
    pub(crate) first: i32,
    /// Number of query rows.
    pub(crate) rows: i32,
    /// Position of the first one relative to key 0.
    pub(crate) position: i32,
    /// What they see, from left to right, ending right before key 0.
    pub(crate) blocks: &'a [Block],
}

/// One entry of `use`: compact block number, its first row's position relative to key 0, slides.
type Use = [i32; 3];

/// Adds `use_indptr`, `use`, `block`, `user_indptr`, `user`, `user_pos`, `user_slides` and `span`.
pub(crate) fn push_uses(tables: &mut Tables, queries: &[Queries<'_>]) {
    let blocks = distinct(queries);
    let uses = uses(queries, &blocks);
    tables.push_indptr("use_indptr", queries.iter().map(|run| run.blocks.len()));
    tables.push_rows("use", uses.iter().copied());
    tables.push_rows("block", blocks.iter().map(|block| [block.first, block.rows]));
    push_users(tables, queries, &uses, blocks.len());
}

fn distinct(queries: &[Queries<'_>]) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut last: &[Block] = &[];
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

fn uses(queries: &[Queries<'_>], blocks: &[Block]) -> Vec<Use> {
    let mut uses: Vec<Use> = Vec::new();
    let mut last: &[Block] = &[];
    for run in queries {
        let count = run.blocks.len();
        if run.blocks == last {
            // Neighbours mostly see the same blocks.
            uses.extend_from_within(uses.len() - count..);
            continue;
        }
        last = run.blocks;
        let mut position: i32 = -last.iter().map(|block| block.rows).sum::<i32>();
        for block in last {
            let number = blocks.partition_point(|other| other.prefix < block.prefix);
            uses.push([int(number), position, block.slides]);
            position += block.rows;
        }
    }
    uses
}

/// The uses turned round: for each block its query rows, so that a sum over them has a fixed order.
fn push_users(tables: &mut Tables, queries: &[Queries<'_>], uses: &[Use], blocks: usize) {
    let mut counts = vec![0_usize; blocks];
    let mut at = 0;
    for run in queries {
        for [block, ..] in &uses[at..at + run.blocks.len()] {
            counts[index(*block)] += index(run.rows);
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
    let mut table = vec![[0_i32; 3]; total];
    let mut at = 0;
    for run in queries {
        for row in 0..run.rows {
            for [block, position, slides] in &uses[at..at + run.blocks.len()] {
                let place = &mut next[index(*block)];
                table[*place] = [run.first + row, position - run.position - row, *slides];
                *place += 1;
            }
        }
        at += run.blocks.len();
    }
    for (column, name) in ["user", "user_pos", "user_slides"].into_iter().enumerate() {
        tables.push(name, table.iter().map(|user| user[column]));
    }
    let spans = counts
        .iter()
        .zip(&next)
        .map(|(count, end)| span(&table[end - count..*end]));
    tables.push_rows("span", spans);
}

fn span(users: &[[i32; 3]]) -> [i32; 3] {
    let consecutive = users.windows(2).all(|pair| pair[1][0] == pair[0][0] + 1);
    [
        users.first().map_or(0, |user| user[0]),
        int(users.len()),
        i32::from(consecutive),
    ]
}
