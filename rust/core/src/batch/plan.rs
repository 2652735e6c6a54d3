//! The tables of one packed forward.

use super::block_tables::{Block, Queries, push_uses};
use super::int32::{index, int};
use super::length_buckets::buckets;
use super::table_buffer::Tables;
use crate::error::{Error, Result};

/// Most entries of one table: 512 MiB of int32, far beyond any real forward.
const MAX_ENTRIES: usize = 1 << 27;

/// What one packed forward is made of: S sequences of N tokens, with their prefixes.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// Tokens of each sequence, at least 1.
    pub lengths: &'a [i32],
    /// Sequence `s` uses `prefix[prefix_indptr[s]..prefix_indptr[s + 1]]`, left to right.
    pub prefix_indptr: &'a [i32],
    /// Prefix numbers.
    pub prefix: &'a [i32],
    /// By prefix number: first row in the prefix tensor, rows, `pos_start`, slides (0 or 1).
    pub prefix_rows: &'a [[i32; 4]],
    /// What the kernels' tables cut the work into.
    pub tiles: Tiles,
    /// Most groups of the padded layout, at least 1.
    pub buckets: usize,
}

/// Heights of the kernels' tiles; 0 makes none of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tiles {
    /// Query rows.
    pub tokens: usize,
    /// Keys.
    pub keys: usize,
    /// Rows of a prefix block.
    pub rows: usize,
}

/// One sequence of a packed forward.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sequence<'a> {
    /// Tokens before these whose keys are in the arena.
    pub(crate) context: i32,
    pub(crate) len: i32,
    pub(crate) pos_start: i32,
    pub(crate) blocks: &'a [Block],
}

/// Makes the tables; returns them and the reach: the largest length plus rows of its prefixes.
///
/// # Errors
/// [`Error::Config`] for input that does not fit its description or needs more than int32 or memory holds, [`Error::UnknownPrefix`] for a
/// number that `prefix_rows` does not have.
pub fn plan_packed(input: &Packed<'_>) -> Result<(Tables, i32)> {
    check(input)?;
    let (blocks, borders, starts) = gather_blocks(input)?;
    let sequences: Vec<Sequence<'_>> = (0..input.lengths.len())
        .map(|s| Sequence {
            context: 0,
            len: input.lengths[s],
            pos_start: starts[s],
            blocks: &blocks[borders[s]..borders[s + 1]],
        })
        .collect();
    check_sizes(&sequences, input.buckets)?;
    let mut tables = Tables::default();
    let reach = push_packed(&mut tables, &sequences, input.tiles, input.buckets);
    Ok((tables, reach))
}

/// Adds the sections of a packed forward and returns its reach. The sizes have been checked.
pub(crate) fn push_packed(tables: &mut Tables, sequences: &[Sequence<'_>], tiles: Tiles, most: usize) -> i32 {
    let firsts = firsts(sequences);
    let segments = || sequences.iter().zip(&firsts);
    let mut key = 0;
    tables.push_rows(
        "seg",
        segments().map(|(s, &first)| {
            let keys = s.context + s.len;
            key += keys;
            [first, s.len, key - keys, keys]
        }),
    );
    tables.push("seg_pos", sequences.iter().map(|s| s.context));
    let queries: Vec<Queries<'_>> = segments()
        .map(|(s, &first)| Queries {
            first,
            rows: s.len,
            position: s.context,
            blocks: s.blocks,
        })
        .collect();
    push_uses(tables, &queries);
    push_padded(tables, sequences, &firsts, most);
    tables.push(
        "position_ids",
        sequences
            .iter()
            .flat_map(|s| s.pos_start + s.context..s.pos_start + s.context + s.len),
    );
    push_tiles(tables, sequences, &firsts, tiles);
    sequences
        .iter()
        .map(|s| s.context + s.len + rows(s.blocks))
        .max()
        .unwrap_or(0)
}

/// Adds `tiles`, `key_tiles` and `block_tiles`. The keys of a sequence are its own tokens.
fn push_tiles(tables: &mut Tables, sequences: &[Sequence<'_>], firsts: &[i32], tiles: Tiles) {
    let numbered = || sequences.iter().zip(firsts).zip(0..);
    tables.push_rows(
        "tiles",
        numbered().flat_map(|((s, &first), number)| starts(s.len, tiles.tokens).map(move |row| [number, first + row])),
    );
    tables.push_rows(
        "key_tiles",
        numbered().flat_map(|((s, _), number)| starts(s.len, tiles.keys).map(move |key| [number, number + 1, key])),
    );
    let blocks = tables.rows::<2>("block");
    tables.push_rows(
        "block_tiles",
        blocks
            .iter()
            .zip(0..)
            .flat_map(|([_, rows], number)| starts(*rows, tiles.rows).map(move |row| [number, row])),
    );
}

/// First rows of the tiles of `rows` rows.
fn starts(rows: i32, height: usize) -> impl Iterator<Item = i32> {
    (0..if height == 0 { 0 } else { rows }).step_by(height.max(1))
}

/// Rows of blocks together.
pub(crate) fn rows(blocks: &[Block]) -> i32 {
    blocks.iter().map(|block| block.rows).sum()
}

/// First token of each sequence.
pub(crate) fn firsts(sequences: &[Sequence<'_>]) -> Vec<i32> {
    let sums = sequences.iter().scan(0, |sum, s| {
        *sum += s.len;
        Some(*sum - s.len)
    });
    sums.collect()
}

fn push_padded(tables: &mut Tables, sequences: &[Sequence<'_>], firsts: &[i32], most: usize) {
    let lengths: Vec<i32> = sequences.iter().map(|s| s.len).collect();
    let layout = buckets(&lengths, most);
    tables.push_rows("bucket", layout.buckets.iter().copied());
    let mut scatter = vec![0; lengths.iter().map(|len| index(*len)).sum()];
    let padded = layout.buckets.iter().flat_map(|[count, len]| (0..*count).map(|_| *len));
    let offset = tables.open();
    for (&s, padded) in layout.order.iter().zip(padded) {
        let (first, len, place) = (firsts[s], lengths[s], int(tables.data.len() - offset));
        tables.data.extend((0..padded).map(|token| first + token.min(len - 1)));
        for (entry, place) in scatter[index(first)..index(first + len)].iter_mut().zip(place..) {
            *entry = place;
        }
    }
    tables.close("gather", offset, 0);
    tables.push("scatter", scatter);
}

fn check(input: &Packed<'_>) -> Result<()> {
    let wrong = |text: String| Err(Error::Config(text));
    if input.buckets == 0 {
        return wrong("buckets is 0: expected 1 or more; 4 is the default".to_owned());
    }
    if let Some(s) = input.lengths.iter().position(|len| *len < 1) {
        return wrong(format!(
            "length {} of sequence {s}: expected 1 or more; drop empty sequences",
            input.lengths[s]
        ));
    }
    let indptr = input.prefix_indptr;
    let ends = (indptr.first().copied(), indptr.last().map(|last| index(*last)));
    if indptr.len() != input.lengths.len() + 1 || ends != (Some(0), Some(input.prefix.len())) || !indptr.is_sorted() {
        return wrong(format!(
            "prefix_indptr does not fit: expected {} borders that start at 0, never descend and end at {}",
            input.lengths.len() + 1,
            input.prefix.len()
        ));
    }
    for (number, [first, rows, pos_start, slides]) in input.prefix_rows.iter().enumerate() {
        let values = [*first, *rows, *pos_start];
        if values.iter().any(|value| !(0..=1 << 30).contains(value)) || !matches!(slides, 0 | 1) {
            return wrong(format!(
                "row {number} of prefix_rows is {:?}: expected first row, rows and pos_start from 0 to 2**30 and slides 0 or 1",
                [*first, *rows, *pos_start, *slides]
            ));
        }
    }
    Ok(())
}

/// Blocks of all sequences without the empty ones, borders between sequences, and each sequence's `pos_start`.
fn gather_blocks(input: &Packed<'_>) -> Result<(Vec<Block>, Vec<usize>, Vec<i32>)> {
    let mut blocks = Vec::with_capacity(input.prefix.len());
    let (mut borders, mut starts) = (vec![0], Vec::with_capacity(input.lengths.len()));
    for pair in input.prefix_indptr.windows(2) {
        let mut start = 0;
        for number in &input.prefix[index(pair[0])..index(pair[1])] {
            let row = usize::try_from(*number)
                .ok()
                .and_then(|number| input.prefix_rows.get(number));
            let &[first, rows, pos_start, slides] = row.ok_or(Error::UnknownPrefix(i64::from(*number)))?;
            start = start.max(pos_start);
            if rows > 0 {
                blocks.push(Block {
                    prefix: i64::from(*number),
                    first,
                    rows,
                    slides,
                    set: 0,
                });
            }
        }
        borders.push(blocks.len());
        starts.push(start);
    }
    Ok((blocks, borders, starts))
}

fn check_sizes(sequences: &[Sequence<'_>], most: usize) -> Result<()> {
    let large = |what: &str, count: i64| {
        Err(Error::Config(format!(
            "{count} {what}: expected at most {MAX_ENTRIES} in one forward; make the batch smaller"
        )))
    };
    let limit = i64::try_from(MAX_ENTRIES).unwrap_or(i64::MAX);
    let (mut tokens, mut users, mut seen) = (0_i64, 0_i64, 0_i64);
    for sequence in sequences {
        let reach = sequence
            .blocks
            .iter()
            .fold(i64::from(sequence.len), |sum, block| sum + i64::from(block.rows));
        if reach > i64::from(i32::MAX) {
            return large("keys of one sequence", reach);
        }
        tokens += i64::from(sequence.len);
        seen += reach - i64::from(sequence.len);
        users += i64::from(sequence.len) * i64::try_from(sequence.blocks.len()).unwrap_or(i64::MAX);
        if tokens > limit || users > limit {
            return large("tokens times prefixes", tokens.max(users));
        }
        if seen > limit {
            return large("prefix rows", seen);
        }
    }
    let lengths: Vec<i32> = sequences.iter().map(|s| s.len).collect();
    let places = buckets(&lengths, most).places();
    if places > MAX_ENTRIES {
        large("padded tokens", i64::try_from(places).unwrap_or(i64::MAX))
    } else {
        Ok(())
    }
}
