//! The work of a decode step's attention: which blocks a group of rows reads once and which each row reads by itself, and how keys are split.
//!
//! All costs are bytes of one kv head, so that a launch and the start of a program compare with reading keys (kernels/README.md).

use super::int32::{index, int};
use super::table_buffer::Tables;

/// Splits are at least twice this long, and a multiple of it.
const GRAIN: usize = 64;

/// How decode steps are cut, and what their parts cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Decode {
    /// Most rows of a group's tile; 0 makes no tables.
    pub users: usize,
    /// Work items that fill the device, at least 1.
    pub fill: usize,
    /// Key and value of one row.
    pub key_bytes: usize,
    /// A partial sum of one row, written and read.
    pub part_bytes: usize,
    /// What could have been read while a work item starts.
    pub item_bytes: usize,
    /// What could have been read during the launch that merges partial sums.
    pub launch_bytes: usize,
    /// Fill the step's tables up to sizes that depend only on the next power of two of its rows and the most prefixes of a request.
    pub padded: bool,
}

/// Rows that stand for nothing: a row of the slot table that no request gets, and where its one key goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dead {
    pub(crate) row: usize,
    pub(crate) slot: usize,
}

/// The step as the tables say it.
struct Step<'a> {
    lens: &'a [i32],
    use_indptr: &'a [i32],
    uses: &'a [[i32; 3]],
    blocks: &'a [[i32; 2]],
    user_indptr: &'a [i32],
    user: &'a [i32],
}

#[derive(Debug, Default)]
struct Work {
    items: Vec<[i32; 6]>,
    grouped: Vec<i32>,
    part_indptr: Vec<i32>,
    parts: Vec<i32>,
}

impl Decode {
    /// Most items and partial sums of a step of `rows` rows with at most `uses` prefixes each: a block's tiles are at most two thirds of its users,
    /// since one that saves nothing is not grouped, and splits add at most `fill`.
    pub(crate) fn capacity(&self, rows: usize, uses: usize) -> (usize, usize) {
        if self.users == 0 {
            return (0, 0);
        }
        let seen = rows.saturating_mul(uses);
        let items = rows.saturating_add(seen - seen / 3).saturating_add(self.fill);
        let parts = seen
            .saturating_add(rows)
            .saturating_add(self.fill.saturating_mul(1 + self.users.min(rows)));
        (items, parts)
    }

    /// int32 entries of its tables in a step, none longer.
    pub(crate) fn len(&self, rows: usize, uses: usize) -> usize {
        let (items, parts) = self.capacity(rows, uses);
        [items.saturating_mul(6), parts, rows.saturating_mul(uses), rows + 1]
            .into_iter()
            .fold(0, usize::saturating_add)
    }

    fn tiles(&self, users: usize) -> usize {
        users.div_ceil(self.users)
    }

    /// Bytes that a group saves on a block of `rows` rows: reads of all users but one a tile, less the partial sums of its rows (the block's and the
    /// row's own) and the tiles' starts.
    fn saved(&self, users: usize, rows: usize) -> i64 {
        let bytes = |count: usize, each: usize| int64(count.saturating_mul(each));
        let tiles = self.tiles(users);
        let reads = bytes((users - tiles.min(users)).saturating_mul(rows), self.key_bytes);
        reads
            .saturating_sub(bytes(2 * users, self.part_bytes))
            .saturating_sub(bytes(tiles, self.item_bytes))
    }

    /// Keys of a split: as many as fill the device, but not so few that starting an item costs more than they do.
    fn share(&self, keys: usize) -> usize {
        keys.div_ceil(self.fill.max(1)).next_multiple_of(GRAIN).max(2 * GRAIN)
    }

    /// For each block whether groups read it. If rows are split anyway, the merging launch costs nothing more.
    fn group(&self, step: &Step<'_>) -> Vec<bool> {
        let saved: Vec<i64> = (0..step.blocks.len())
            .map(|block| self.saved(step.users(block).len(), step.rows(block)))
            .collect();
        let worth = saved.iter().filter(|saved| **saved > 0).sum::<i64>();
        let keys: Vec<usize> = step.keys(&vec![false; saved.len()]).collect();
        let share = self.share(keys.iter().sum());
        let split = keys.iter().any(|keys| *keys >= 2 * share);
        let enough = worth > if split { 0 } else { int64(self.launch_bytes) };
        saved.into_iter().map(|saved| enough && saved > 0).collect()
    }

    fn work(&self, step: &Step<'_>) -> Work {
        let grouped = self.group(step);
        let keys: Vec<usize> = step.keys(&grouped).collect();
        let read = (0..grouped.len()).filter(|block| grouped[*block]);
        let shared = read.map(|block| self.tiles(step.users(block).len()) * step.rows(block));
        let share = self.share(keys.iter().sum::<usize>() + shared.sum::<usize>());
        let mut work = Work {
            grouped: grouped.iter().map(|grouped| i32::from(*grouped)).collect(),
            items: Vec::with_capacity(2 * keys.len() + self.fill),
            ..Work::default()
        };
        // (row, partial sum), in the order in which a row merges them.
        let mut merged: Vec<[i32; 2]> = Vec::with_capacity(2 * keys.len() + step.user.len());
        let mut next = 0;
        for block in (0..grouped.len()).filter(|block| grouped[*block]) {
            let (users, rows) = (step.users(block), step.rows(block));
            for (tile, first) in users
                .chunks(self.users)
                .zip((step.user_indptr[block]..).step_by(self.users))
            {
                for [low, high] in splits(rows, share) {
                    work.items
                        .push([int(block), first, int(tile.len()), int(low), int(high), next]);
                    merged.extend(tile.iter().zip(next..).map(|(row, part)| [*row, part]));
                    next += int(tile.len());
                }
            }
        }
        for (row, &keys) in keys.iter().enumerate() {
            let whole = pieces(keys, share).0 == 1 && step.blocks_of(row).all(|block| !grouped[block]);
            for [low, high] in splits(keys, share) {
                let part = if whole { -1 } else { next };
                work.items.push([-1, int(row), 1, int(low), int(high), part]);
                if !whole {
                    merged.push([int(row), part]);
                    next += 1;
                }
            }
        }
        work.merge(&merged, keys.len());
        work
    }
}

impl Step<'_> {
    fn users(&self, block: usize) -> &[i32] {
        &self.user[index(self.user_indptr[block])..index(self.user_indptr[block + 1])]
    }

    fn rows(&self, block: usize) -> usize {
        index(self.blocks[block][1])
    }

    fn blocks_of(&self, row: usize) -> impl Iterator<Item = usize> {
        self.uses[index(self.use_indptr[row])..index(self.use_indptr[row + 1])]
            .iter()
            .map(|[block, ..]| index(*block))
    }

    /// Keys that each row reads by itself.
    fn keys(&self, grouped: &[bool]) -> impl Iterator<Item = usize> {
        self.lens.iter().enumerate().map(|(row, len)| {
            let alone = self.blocks_of(row).filter(|block| !grouped[*block]);
            index(*len) + alone.map(|block| self.rows(block)).sum::<usize>()
        })
    }
}

impl Work {
    /// Sorts the partial sums by row, each row's in the order given.
    fn merge(&mut self, merged: &[[i32; 2]], rows: usize) {
        let mut ends = vec![0; rows + 1];
        for [row, _] in merged {
            ends[index(*row) + 1] += 1;
        }
        for row in 0..rows {
            ends[row + 1] += ends[row];
        }
        self.part_indptr.clone_from(&ends);
        self.parts = vec![0; merged.len()];
        for [row, part] in merged {
            let place = &mut ends[index(*row)];
            self.parts[index(*place)] = *part;
            *place += 1;
        }
    }
}

fn int64(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// How many pieces `keys` keys are cut into, and their length: at most twice the share.
fn pieces(keys: usize, share: usize) -> (usize, usize) {
    if keys < 2 * share {
        return (1, keys); // almost every row: no divisions
    }
    let len = keys.div_ceil(keys / share).next_multiple_of(GRAIN);
    (keys.div_ceil(len), len)
}

/// First key and one past the last of each piece; one empty piece for no keys.
fn splits(keys: usize, share: usize) -> impl Iterator<Item = [usize; 2]> {
    let (count, len) = pieces(keys, share);
    (0..count).map(move |piece| [piece * len, keys.min((piece + 1) * len)])
}

/// Adds `work`, `grouped`, `part_indptr` and `part` to the tables of a step, which are all that `tables` has sections of; fills all up where it is
/// asked to. `most`: rows and prefixes of a request that there will be at most.
pub(crate) fn push_decode_work(tables: &mut Tables, decode: &Decode, most: (usize, usize), dead: Dead) {
    let (rows, prefixes) = most;
    let filled = tables.get("row").map_or(0, <[i32]>::len);
    let padded = (decode.padded && decode.users > 0).then(|| (filled.next_power_of_two().min(rows), prefixes));
    if let Some((rows, prefixes)) = padded {
        fill_up(tables, rows, rows * prefixes, dead);
    }
    let mut work = if decode.users == 0 {
        Work::default()
    } else {
        let get = |name| tables.get(name).unwrap_or(&[]);
        decode.work(&Step {
            lens: get("lens"),
            use_indptr: get("use_indptr"),
            uses: get("use").as_chunks().0,
            blocks: get("block").as_chunks().0,
            user_indptr: get("user_indptr"),
            user: get("user"),
        })
    };
    if let Some((rows, prefixes)) = padded {
        let (items, parts) = decode.capacity(rows, prefixes);
        work.items.resize(items, [-1, 0, 0, 0, 0, -1]);
        work.parts.resize(parts, 0);
    }
    tables.push_rows("work", work.items);
    tables.push("grouped", work.grouped);
    tables.push("part_indptr", work.part_indptr);
    tables.push("part", work.parts);
}

/// Writes the tables again with room for `rows` rows and `uses` uses of blocks; the new rows are `dead` ones with one key.
fn fill_up(tables: &mut Tables, rows: usize, uses: usize, dead: Dead) {
    let sections = std::mem::take(&mut tables.sections);
    let start = sections.first().map_or(0, |section| section.offset);
    let old = tables.data.split_off(start);
    for section in &sections {
        let values = &old[section.offset - start..][..section.len()];
        let last = values.last().copied().unwrap_or(0);
        let (count, value) = match section.name {
            "row" => (rows, int(dead.row)),
            "slot" => (rows, int(dead.slot)),
            "lens" => (rows, 1),
            "position_ids" => (rows, 0),
            "use_indptr" => (rows + 1, last),
            "user_indptr" => (uses + 1, last),
            _ => (uses, 0),
        };
        let offset = tables.open();
        tables.data.extend_from_slice(values);
        tables.data.resize(offset + count * section.cols.max(1), value);
        tables.close(section.name, offset, section.cols);
    }
}

#[cfg(test)]
mod tests {
    use super::{Decode, Step, pieces, splits};

    const DECODE: Decode = Decode {
        users: 16,
        fill: 10,
        key_bytes: 512,
        part_bytes: 4000,
        item_bytes: 20_000,
        launch_bytes: 100_000,
        padded: false,
    };

    /// Rows with one own key that all see one block of `rows` rows.
    fn grouped(decode: &Decode, members: i32, rows: i32) -> bool {
        let lens = vec![1; members.unsigned_abs() as usize];
        let (use_indptr, all): (Vec<i32>, Vec<i32>) = ((0..=members).collect(), (0..members).collect());
        let uses = vec![[0, -rows, 1]; lens.len()];
        let step = Step {
            lens: &lens,
            use_indptr: &use_indptr,
            uses: &uses,
            blocks: &[[0, rows]],
            user_indptr: &[0, members],
            user: &all,
        };
        decode.group(&step)[0]
    }

    #[test]
    fn a_group_must_save_more_than_its_parts_cost() {
        // 8 users, 1 tile: 7 * rows * 512 - 16 * 4000 - 20000 = 0 at 23.4 rows.
        let free = Decode {
            launch_bytes: 0,
            ..DECODE
        };
        assert_eq!((free.saved(8, 23), free.saved(8, 24)), (-1568, 2016));
        assert_eq!((grouped(&free, 8, 23), grouped(&free, 8, 24)), (false, true));
        assert!(
            !grouped(&Decode { users: 1, ..free }, 8, 10_000),
            "one row a tile saves nothing"
        );
        assert!(!grouped(&free, 1, 10_000), "one row shares with nobody");
    }

    #[test]
    fn the_merging_launch_is_paid_once_and_only_if_nothing_is_split() {
        // 100000 more: 51.3 rows. With a share of 128 keys nothing of less than 256 keys is split.
        assert_eq!((grouped(&DECODE, 8, 51), grouped(&DECODE, 8, 52)), (false, true));
        let many = Decode {
            fill: 1000,
            launch_bytes: usize::MAX,
            ..DECODE
        };
        assert_eq!((grouped(&many, 8, 254), grouped(&many, 8, 255)), (false, true));
    }

    #[test]
    fn tiles_are_counted() {
        // 17 users are two tiles: 15 reads saved, 34 partial sums, 2 starts.
        assert_eq!(DECODE.saved(17, 100), 15 * 100 * 512 - 34 * 4000 - 40_000);
    }

    #[test]
    fn pieces_cover_their_keys_and_are_near_their_share() {
        for keys in 0..2000 {
            for share in [128, 192, 1024] {
                let (count, len) = pieces(keys, share);
                let found: Vec<[usize; 2]> = splits(keys, share).collect();
                assert!(found.len() == count && len <= 2 * share);
                assert!(count <= (keys / share).max(1));
                assert!(found[0][0] == 0 && found[count - 1][1] == keys);
                assert!(found.windows(2).all(|pair| pair[0][1] == pair[1][0]));
                assert!(keys == 0 || found.iter().all(|[low, high]| low < high));
            }
        }
    }

    #[test]
    fn a_share_fills_the_device_and_is_not_tiny() {
        assert_eq!(
            [0, 1280, 1281, 1921].map(|keys| DECODE.share(keys)),
            [128, 128, 192, 256]
        );
    }
}
