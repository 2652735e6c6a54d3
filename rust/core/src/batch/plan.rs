//! Tables of a packed forward: sequences of several prefixes, laid end to end in one batch without padding.

use std::borrow::Cow;

use super::block_tables::{PrefixBlock, QueryRun, push_block_tables};
use super::int32::{to_i32, to_usize};
use super::length_buckets::length_buckets;
use super::place::{Place, Positions};
use super::table_buffer::TableBuffer;
use crate::error::{Error, Limit, Result};

/// Largest number of entries of one table, 512 MiB of int32.
const MAX_ENTRIES: usize = 1 << 27;

/// Sequences of a packed forward, with their prefixes.
#[derive(Debug, Clone, Copy)]
pub struct PackedInputs<'a> {
    /// Tokens of each sequence, at least 1.
    pub lengths: &'a [i32],
    /// Index of the last prompt token of each sequence, before which its infixes stand.
    pub last_prompt_token: &'a [i32],
    /// Borders between the sequences in `prefix`. Sequence `s` uses
    /// `prefix[prefix_indptr[s]..prefix_indptr[s + 1]]`, from left to right.
    pub prefix_indptr: &'a [i32],
    /// Prefix numbers, which are indices into `prefix_rows`.
    pub prefix: &'a [i32],
    /// First row in the prefix tensor, number of rows, `pos_start`, slides (0 or 1) and number of the [`Place`] of each
    /// prefix.
    pub prefix_rows: &'a [[i32; 5]],
    /// Tile sizes of the kernels.
    pub tiles: TileSizes,
    /// Largest number of length buckets of the padded layout, at least 1.
    pub buckets: usize,
    /// Number of keys of each sequence, at least 1, if the keys are not its tokens.
    pub key_lengths: Option<&'a [i32]>,
    /// Whether to make the padded layout. Its tables are empty otherwise.
    pub padded: bool,
}

/// Tile sizes of the kernels. 0 disables the tile table of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TileSizes {
    /// Query rows per query tile.
    pub queries: usize,
    /// Keys per key tile.
    pub keys: usize,
    /// Prefix rows per block tile.
    pub prefix_rows: usize,
}

/// Keys that a sequence reads besides its prefix blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    /// Its own tokens, the earlier ones included.
    Own,
    /// Keys of the forward that are not its tokens, as in cross-attention. They have no positions.
    Given(i32),
}

/// One sequence of a packed forward.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sequence<'a> {
    /// Number of earlier tokens of the sequence, whose keys are in the arena.
    pub(crate) context: i32,
    /// Number of tokens of this forward.
    pub(crate) len: i32,
    pub(crate) keys: Keys,
    pub(crate) positions: Positions,
    pub(crate) blocks: &'a [PrefixBlock],
}

impl Sequence<'_> {
    /// Number of keys besides the prefix blocks.
    fn num_keys(&self) -> i32 {
        match self.keys {
            Keys::Own => self.context + self.len,
            Keys::Given(keys) => keys,
        }
    }
}

/// A run of query rows of a sequence that see the same blocks. A sequence with an infix has up to two.
#[derive(Debug)]
struct Segment<'a> {
    /// Number of the sequence.
    sequence: usize,
    /// First query row.
    first: i32,
    rows: i32,
    /// Number of keys.
    keys: i32,
    /// Position of the first query row relative to the sequence's key 0.
    position: i32,
    blocks: Cow<'a, [PrefixBlock]>,
}

/// Makes the tables of a packed forward. Returns them and the reach.
///
/// The reach is the largest number of keys that a query can see, the length of a sequence plus the rows of its
/// prefixes.
///
/// # Errors
/// [`Error::Config`] for inputs that do not fit their description. [`Error::Capacity`] for more entries than a table
/// may have.
/// [`Error::UnknownPrefix`] for a number that `prefix_rows` does not have.
pub fn plan_packed(inputs: &PackedInputs<'_>) -> Result<(TableBuffer, i32)> {
    check(inputs)?;
    let (blocks, borders, positions) = gather_blocks(inputs)?;
    let sequences: Vec<Sequence<'_>> = (0..inputs.lengths.len())
        .map(|s| Sequence {
            context: 0,
            len: inputs.lengths[s],
            keys: inputs.key_lengths.map_or(Keys::Own, |keys| Keys::Given(keys[s])),
            positions: positions[s],
            blocks: &blocks[borders[s]..borders[s + 1]],
        })
        .collect();
    let buckets = inputs.padded.then_some(inputs.buckets);
    check_sizes(&sequences, buckets)?;
    let mut tables = TableBuffer::default();
    let reach = push_packed(&mut tables, &sequences, inputs.tiles, buckets);
    Ok((tables, reach))
}

/// Adds the tables of a packed forward, whose sizes have been checked, and returns its reach.
///
/// * `max_buckets`: largest number of length buckets of the padded layout, `None` for no padded layout.
pub(crate) fn push_packed(
    tables: &mut TableBuffer,
    sequences: &[Sequence<'_>],
    tiles: TileSizes,
    max_buckets: Option<usize>,
) -> i32 {
    let first_rows = first_rows(sequences);
    let segments = segments(sequences, &first_rows);
    let first_keys: Vec<i32> = sequences
        .iter()
        .scan(0, |sum, s| {
            *sum += s.num_keys();
            Some(*sum - s.num_keys())
        })
        .collect();
    tables.push_rows(
        "seg",
        segments
            .iter()
            .map(|s| [s.first, s.rows, first_keys[s.sequence], s.keys]),
    );
    tables.push("seg_pos", segments.iter().map(|s| s.position));
    let queries: Vec<QueryRun<'_>> = segments
        .iter()
        .map(|s| QueryRun {
            first: s.first,
            rows: s.rows,
            position: s.position,
            blocks: &s.blocks,
        })
        .collect();
    push_block_tables(tables, &queries);
    push_padded_layout(tables, sequences, &first_rows, max_buckets);
    tables.push(
        "position_ids",
        sequences
            .iter()
            .flat_map(|s| (s.context..s.context + s.len).map(|token| s.positions.at(token))),
    );
    push_tiles(tables, sequences, &segments, tiles);
    sequences
        .iter()
        .map(|s| s.num_keys() + num_rows(s.blocks))
        .max()
        .unwrap_or(0)
}

/// Segments of the sequences, in order.
fn segments<'a>(sequences: &[Sequence<'a>], first_rows: &[i32]) -> Vec<Segment<'a>> {
    let mut found = Vec::with_capacity(sequences.len());
    for (sequence, (s, &first)) in sequences.iter().zip(first_rows).enumerate() {
        let has_infix = s.blocks.iter().any(|block| block.place.is_infix());
        // Number of rows before the split.
        let before = (s.positions.split - s.context).clamp(0, s.len);
        let mut push = |from: i32, rows: i32, blocks: Cow<'a, [PrefixBlock]>| {
            if rows > 0 {
                found.push(Segment {
                    sequence,
                    first: first + from,
                    rows,
                    keys: match s.keys {
                        Keys::Own => s.context + from + rows,
                        Keys::Given(keys) => keys,
                    },
                    position: s.context + from,
                    blocks,
                });
            }
        };
        if has_infix && before > 0 {
            let is_front = |block: &&PrefixBlock| !block.place.is_infix();
            push(0, before, s.blocks.iter().filter(is_front).copied().collect());
            push(before, s.len - before, Cow::Borrowed(s.blocks));
        } else {
            push(0, s.len, Cow::Borrowed(s.blocks));
        }
    }
    found
}

/// Adds `tiles`, `key_tiles` and `block_tiles`. Key tiles do not cover the keys of earlier tokens.
fn push_tiles(tables: &mut TableBuffer, sequences: &[Sequence<'_>], segments: &[Segment<'_>], tiles: TileSizes) {
    let numbered = || segments.iter().zip(0..);
    tables.push_rows(
        "tiles",
        numbered().flat_map(|(s, number)| tile_starts(s.rows, tiles.queries).map(move |row| [number, s.first + row])),
    );
    let mut key_tiles = Vec::new();
    let mut first = 0;
    for same in segments.chunk_by(|a, b| a.sequence == b.sequence) {
        let end = first + to_i32(same.len());
        let sequence = &sequences[same[0].sequence];
        let keys = sequence.num_keys() - sequence.context;
        key_tiles.extend(tile_starts(keys, tiles.keys).map(|key| [first, end, key]));
        first = end;
    }
    tables.push_rows("key_tiles", key_tiles);
    let blocks = tables.rows::<2>("block");
    tables.push_rows(
        "block_tiles",
        blocks
            .iter()
            .zip(0..)
            .flat_map(|([_, rows], number)| tile_starts(*rows, tiles.prefix_rows).map(move |row| [number, row])),
    );
}

/// First rows of the tiles of `rows` rows.
fn tile_starts(rows: i32, tile_size: usize) -> impl Iterator<Item = i32> {
    (0..if tile_size == 0 { 0 } else { rows }).step_by(tile_size.max(1))
}

/// Total number of rows of the blocks.
pub(crate) fn num_rows(blocks: &[PrefixBlock]) -> i32 {
    blocks.iter().map(|block| block.rows).sum()
}

/// First query row of each sequence.
pub(crate) fn first_rows(sequences: &[Sequence<'_>]) -> Vec<i32> {
    let sums = sequences.iter().scan(0, |sum, s| {
        *sum += s.len;
        Some(*sum - s.len)
    });
    sums.collect()
}

/// Adds `bucket`, `gather` and `scatter`, the padded layout of the sequences in length buckets.
///
/// A sequence is padded by repeating its last token. The tables are empty without `max_buckets`.
fn push_padded_layout(
    tables: &mut TableBuffer,
    sequences: &[Sequence<'_>],
    first_rows: &[i32],
    max_buckets: Option<usize>,
) {
    let Some(max_buckets) = max_buckets else {
        tables.push_rows::<2>("bucket", []);
        tables.push("gather", []);
        tables.push("scatter", []);
        return;
    };
    let lengths: Vec<i32> = sequences.iter().map(|s| s.len).collect();
    let layout = length_buckets(&lengths, max_buckets);
    tables.push_rows("bucket", layout.buckets.iter().copied());
    let mut scatter = vec![0; lengths.iter().map(|len| to_usize(*len)).sum()];
    let padded_lens = layout.buckets.iter().flat_map(|[count, len]| (0..*count).map(|_| *len));
    let offset = tables.begin();
    for (&s, padded_len) in layout.order.iter().zip(padded_lens) {
        let (first, len, place) = (first_rows[s], lengths[s], to_i32(tables.data.len() - offset));
        tables
            .data
            .extend((0..padded_len).map(|token| first + token.min(len - 1)));
        for (entry, place) in scatter[to_usize(first)..to_usize(first + len)].iter_mut().zip(place..) {
            *entry = place;
        }
    }
    tables.end("gather", offset, 0);
    tables.push("scatter", scatter);
}

fn check(inputs: &PackedInputs<'_>) -> Result<()> {
    let wrong = |text: String| Err(Error::Config(text));
    if inputs.buckets == 0 {
        return wrong("buckets is 0: expected 1 or more; 4 is the default".to_owned());
    }
    if let Some(s) = inputs.lengths.iter().position(|len| *len < 1) {
        return wrong(format!(
            "length {} of sequence {s}: expected 1 or more; drop empty sequences",
            inputs.lengths[s]
        ));
    }
    let indptr = inputs.prefix_indptr;
    let ends = (indptr.first().copied(), indptr.last().map(|last| to_usize(*last)));
    if indptr.len() != inputs.lengths.len() + 1 || ends != (Some(0), Some(inputs.prefix.len())) || !indptr.is_sorted() {
        return wrong(format!(
            "prefix_indptr does not fit: expected {} non-descending borders that start at 0 and end at {}",
            inputs.lengths.len() + 1,
            inputs.prefix.len()
        ));
    }
    if let Some(keys) = inputs.key_lengths
        && (keys.len() != inputs.lengths.len() || keys.iter().any(|keys| *keys < 1))
    {
        return wrong(format!(
            "key_lengths does not fit: expected {} numbers of keys of 1 or more, one for each sequence",
            inputs.lengths.len()
        ));
    }
    let mut lengths = inputs.lengths.iter().zip(inputs.last_prompt_token);
    if inputs.last_prompt_token.len() != inputs.lengths.len() || !lengths.all(|(len, last)| (0..*len).contains(last)) {
        return wrong("last_prompt_token does not fit: expected the index of one token of each sequence".to_owned());
    }
    for (number, row) in inputs.prefix_rows.iter().enumerate() {
        let &[first, rows, pos_start, slides, place] = row;
        Place::from_number(i64::from(place))?;
        if inputs.key_lengths.is_some() && place != 0 {
            return wrong(format!(
                "prefix {number} stands at place {place}: expected 0 (before the first token) where key_lengths is \
                 given, because the last prompt token is not among the keys"
            ));
        }
        let values = [first, rows, pos_start];
        if values.iter().any(|value| !(0..=1 << 30).contains(value)) || !matches!(slides, 0 | 1) {
            return wrong(format!(
                "row {number} of prefix_rows is {row:?}: expected first row, rows and pos_start from 0 to 2**30 and \
                 slides 0 or 1"
            ));
        }
    }
    Ok(())
}

/// Non-empty blocks of all sequences, borders between the sequences, and positions of each sequence.
fn gather_blocks(inputs: &PackedInputs<'_>) -> Result<(Vec<PrefixBlock>, Vec<usize>, Vec<Positions>)> {
    let mut blocks = Vec::with_capacity(inputs.prefix.len());
    let (mut borders, mut positions) = (vec![0], Vec::with_capacity(inputs.lengths.len()));
    for (pair, last) in inputs.prefix_indptr.windows(2).zip(inputs.last_prompt_token) {
        let mut places = Vec::with_capacity(to_usize(pair[1] - pair[0]));
        for number in &inputs.prefix[to_usize(pair[0])..to_usize(pair[1])] {
            let row = usize::try_from(*number)
                .ok()
                .and_then(|number| inputs.prefix_rows.get(number));
            let &[first, rows, pos_start, slides, place] = row.ok_or(Error::UnknownPrefix(i64::from(*number)))?;
            let place = Place::from_number(i64::from(place))?;
            places.push((place, pos_start));
            if rows > 0 {
                blocks.push(PrefixBlock {
                    prefix: i64::from(*number),
                    first,
                    rows,
                    slides,
                    place,
                    layer_set: 0,
                });
            }
        }
        borders.push(blocks.len());
        positions.push(Positions::new(places.into_iter(), *last));
    }
    Ok((blocks, borders, positions))
}

fn check_sizes(sequences: &[Sequence<'_>], max_buckets: Option<usize>) -> Result<()> {
    let max_keys = usize::try_from(i32::MAX).unwrap_or(usize::MAX);
    let (mut pairs, mut visible_rows, mut all_keys) = (0, 0, 0);
    for sequence in sequences {
        let len = to_usize(sequence.len);
        let rows: usize = sequence.blocks.iter().map(|block| to_usize(block.rows)).sum();
        let keys = to_usize(sequence.num_keys());
        Limit::SequenceKeys.check(keys + rows, max_keys)?;
        all_keys += keys;
        pairs += len * sequence.blocks.len().max(1);
        visible_rows += rows;
        Limit::TokenPrefixPairs.check(pairs, MAX_ENTRIES)?;
        Limit::VisiblePrefixRows.check(visible_rows, MAX_ENTRIES)?;
        Limit::PackedKeys.check(all_keys, MAX_ENTRIES)?;
    }
    let Some(max_buckets) = max_buckets else {
        return Ok(());
    };
    let lengths: Vec<i32> = sequences.iter().map(|s| s.len).collect();
    let padded_tokens = length_buckets(&lengths, max_buckets).padded_tokens();
    Limit::PaddedTokens.check(padded_tokens, MAX_ENTRIES)
}
