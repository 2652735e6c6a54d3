//! Work items of decode attention: which blocks a group of rows reads together, which keys each row reads alone, and
//! how key ranges are split over the device.
//!
//! A block that many rows see is read once per tile of rows instead of once per row. Each reader then produces a
//! partial sum of the softmax, and a second launch merges the partial sums of a row.

use super::super::int32::{to_i32, to_usize};
use super::DecodeSizes;

/// Split lengths are multiples of this number of keys and at least twice this number.
const SPLIT_MULTIPLE: usize = 64;

/// Tables of a decode step that the work depends on.
pub(super) struct StepView<'a> {
    pub(super) lens: &'a [i32],
    pub(super) use_indptr: &'a [i32],
    pub(super) uses: &'a [[i32; 3]],
    pub(super) blocks: &'a [[i32; 2]],
    pub(super) user_indptr: &'a [i32],
    pub(super) user: &'a [i32],
}

#[derive(Debug, Default)]
pub(super) struct WorkTables {
    /// Work items. Part of a block for some of its users: block, first of them in `user`, number of users, first row,
    /// end row, first partial sum. Keys that a row reads alone: -1, row, 1, first key, end key, partial sum or -1 if
    /// the item is the whole result.
    pub(super) items: Vec<[i32; 6]>,
    /// 1 for each block that groups read, else 0.
    pub(super) grouped: Vec<i32>,
    /// Borders between the rows in `parts`.
    pub(super) part_indptr: Vec<i32>,
    /// Partial sums of each row in the order in which they are merged.
    pub(super) parts: Vec<i32>,
}

/// A partial sum of a row.
struct Merge {
    row: usize,
    /// Place of its block in the row's composition, [`usize::MAX`] for the keys that the row reads alone.
    place: usize,
    /// Number of the partial sum.
    part: i32,
}

impl DecodeSizes {
    /// Number of tiles that `users` rows need.
    fn num_tiles(&self, users: usize) -> usize {
        users.div_ceil(self.users)
    }

    /// Bytes that a group saves on a block of `rows` rows.
    ///
    /// The group saves one read per user and pays one per tile. It also pays two partial sums per user, that of the
    /// block and that of the row's remaining keys, and the start of each tile's work item.
    fn saved_bytes(&self, users: usize, rows: usize) -> i64 {
        let bytes = |count: usize, each: usize| to_i64(count.saturating_mul(each));
        let tiles = self.num_tiles(users);
        let reads = bytes((users - tiles.min(users)).saturating_mul(rows), self.key_bytes);
        reads
            .saturating_sub(bytes(2 * users, self.part_bytes))
            .saturating_sub(bytes(tiles, self.item_bytes))
    }

    /// Keys per split, given the number of keys that all items read.
    ///
    /// The device is filled, but a split is never so short that starting its item costs more than reading its keys.
    fn keys_per_split(&self, total_keys: usize) -> usize {
        total_keys
            .div_ceil(self.fill.max(1))
            .next_multiple_of(SPLIT_MULTIPLE)
            .max(2 * SPLIT_MULTIPLE)
    }

    /// Whether groups read each block.
    ///
    /// If a row is split anyway, the launch that merges partial sums costs nothing more.
    fn choose_grouped(&self, step: &StepView<'_>) -> Vec<bool> {
        let saved: Vec<i64> = (0..step.blocks.len())
            .map(|block| self.saved_bytes(step.users(block).len(), step.rows(block)))
            .collect();
        let total_saved = saved.iter().filter(|saved| **saved > 0).sum::<i64>();
        let keys: Vec<usize> = step.keys_read_alone(&vec![false; saved.len()]).collect();
        let split_keys = self.keys_per_split(keys.iter().sum());
        let has_splits = keys.iter().any(|keys| *keys >= 2 * split_keys);
        let pays_off = total_saved > if has_splits { 0 } else { to_i64(self.launch_bytes) };
        saved.into_iter().map(|saved| pays_off && saved > 0).collect()
    }

    pub(super) fn work_tables(&self, step: &StepView<'_>) -> WorkTables {
        let grouped = self.choose_grouped(step);
        let keys: Vec<usize> = step.keys_read_alone(&grouped).collect();
        let grouped_blocks = || (0..grouped.len()).filter(|block| grouped[*block]);
        let keys_read_by_groups =
            grouped_blocks().map(|block| self.num_tiles(step.users(block).len()) * step.rows(block));
        let split_keys = self.keys_per_split(keys.iter().sum::<usize>() + keys_read_by_groups.sum::<usize>());
        let mut work = WorkTables {
            grouped: grouped.iter().map(|grouped| i32::from(*grouped)).collect(),
            items: Vec::with_capacity(2 * keys.len() + self.fill),
            ..WorkTables::default()
        };
        let mut merges: Vec<Merge> = Vec::with_capacity(2 * keys.len() + step.user.len());
        let mut next_part = 0;
        for block in grouped_blocks() {
            let (users, rows) = (step.users(block), step.rows(block));
            for (tile, first) in users
                .chunks(self.users)
                .zip((step.user_indptr[block]..).step_by(self.users))
            {
                for [low, high] in split_ranges(rows, split_keys) {
                    work.items.push([
                        to_i32(block),
                        first,
                        to_i32(tile.len()),
                        to_i32(low),
                        to_i32(high),
                        next_part,
                    ]);
                    merges.extend(tile.iter().zip(next_part..).map(|(row, part)| {
                        Merge {
                            row: to_usize(*row),
                            place: step
                                .blocks_of(to_usize(*row))
                                .take_while(|other| *other != block)
                                .count(),
                            part,
                        }
                    }));
                    next_part += to_i32(tile.len());
                }
            }
        }
        for (row, &keys) in keys.iter().enumerate() {
            let is_whole_result =
                num_splits(keys, split_keys).0 == 1 && step.blocks_of(row).all(|block| !grouped[block]);
            for [low, high] in split_ranges(keys, split_keys) {
                let part = if is_whole_result { -1 } else { next_part };
                work.items.push([-1, to_i32(row), 1, to_i32(low), to_i32(high), part]);
                if !is_whole_result {
                    merges.push(Merge {
                        row,
                        place: usize::MAX,
                        part,
                    });
                    next_part += 1;
                }
            }
        }
        work.set_parts(&merges, keys.len());
        work
    }
}

impl StepView<'_> {
    fn users(&self, block: usize) -> &[i32] {
        &self.user[to_usize(self.user_indptr[block])..to_usize(self.user_indptr[block + 1])]
    }

    fn rows(&self, block: usize) -> usize {
        to_usize(self.blocks[block][1])
    }

    fn blocks_of(&self, row: usize) -> impl Iterator<Item = usize> {
        self.uses[to_usize(self.use_indptr[row])..to_usize(self.use_indptr[row + 1])]
            .iter()
            .map(|[block, ..]| to_usize(*block))
    }

    /// Number of keys that each row reads alone: those of its blocks that are not grouped, and its own.
    fn keys_read_alone(&self, grouped: &[bool]) -> impl Iterator<Item = usize> {
        self.lens.iter().enumerate().map(|(row, len)| {
            let alone = self.blocks_of(row).filter(|block| !grouped[*block]);
            to_usize(*len) + alone.map(|block| self.rows(block)).sum::<usize>()
        })
    }
}

impl WorkTables {
    /// Fills `part_indptr` and `parts`.
    ///
    /// The partial sums are sorted by row and by the place of their keys in the row's composition, so that the numbers
    /// of the blocks do not affect the rounding of the merged result.
    fn set_parts(&mut self, merges: &[Merge], rows: usize) {
        let mut ends = vec![0; rows + 1];
        for merge in merges {
            ends[merge.row + 1] += 1;
        }
        for row in 0..rows {
            ends[row + 1] += ends[row];
        }
        self.part_indptr = ends.iter().copied().map(to_i32).collect();
        let mut sorted = vec![(0, 0); merges.len()];
        for merge in merges {
            let end = &mut ends[merge.row];
            sorted[*end] = (merge.place, merge.part);
            *end += 1;
        }
        let mut start = 0;
        for end in &ends[..rows] {
            sorted[start..*end].sort_by_key(|(place, _)| *place);
            start = *end;
        }
        self.parts = sorted.into_iter().map(|(_, part)| part).collect();
    }
}

fn to_i64(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Number of splits of `keys` keys, and their length, which is at most twice `split_keys`.
fn num_splits(keys: usize, split_keys: usize) -> (usize, usize) {
    if keys < 2 * split_keys {
        // Almost every row takes this path, which needs no division.
        return (1, keys);
    }
    let len = keys.div_ceil(keys / split_keys).next_multiple_of(SPLIT_MULTIPLE);
    (keys.div_ceil(len), len)
}

/// First key and end key of each split. No keys give one empty split.
fn split_ranges(keys: usize, split_keys: usize) -> impl Iterator<Item = [usize; 2]> {
    let (count, len) = num_splits(keys, split_keys);
    (0..count).map(move |split| [split * len, keys.min((split + 1) * len)])
}

#[cfg(test)]
mod tests {
    use super::super::DecodeSizes;
    use super::{StepView, num_splits, split_ranges};

    const SIZES: DecodeSizes = DecodeSizes {
        users: 16,
        fill: 10,
        key_bytes: 512,
        part_bytes: 4000,
        item_bytes: 20_000,
        launch_bytes: 100_000,
        padded: false,
    };

    /// Whether a block of `rows` rows is grouped whose `members` users have one own key each.
    fn is_grouped(sizes: &DecodeSizes, members: i32, rows: i32) -> bool {
        let lens = vec![1; members.unsigned_abs() as usize];
        let (use_indptr, all): (Vec<i32>, Vec<i32>) = ((0..=members).collect(), (0..members).collect());
        let uses = vec![[0, -rows, 1]; lens.len()];
        let step = StepView {
            lens: &lens,
            use_indptr: &use_indptr,
            uses: &uses,
            blocks: &[[0, rows]],
            user_indptr: &[0, members],
            user: &all,
        };
        sizes.choose_grouped(&step)[0]
    }

    #[test]
    fn a_group_must_save_more_than_its_partial_sums_cost() {
        // With 8 users in 1 tile, 7 * rows * 512 - 16 * 4000 - 20000 is 0 at 23.4 rows.
        let free = DecodeSizes {
            launch_bytes: 0,
            ..SIZES
        };
        assert_eq!((free.saved_bytes(8, 23), free.saved_bytes(8, 24)), (-1568, 2016));
        assert_eq!((is_grouped(&free, 8, 23), is_grouped(&free, 8, 24)), (false, true));
        assert!(
            !is_grouped(&DecodeSizes { users: 1, ..free }, 8, 10_000),
            "a tile of one row saves nothing"
        );
        assert!(!is_grouped(&free, 1, 10_000), "a block with one user is not shared");
    }

    #[test]
    fn the_merging_launch_is_charged_only_if_no_row_is_split() {
        // 100000 bytes more are 51.3 rows. Splits have 128 keys, so fewer than 256 keys are not split.
        assert_eq!((is_grouped(&SIZES, 8, 51), is_grouped(&SIZES, 8, 52)), (false, true));
        let many = DecodeSizes {
            fill: 1000,
            launch_bytes: usize::MAX,
            ..SIZES
        };
        assert_eq!((is_grouped(&many, 8, 254), is_grouped(&many, 8, 255)), (false, true));
    }

    #[test]
    fn savings_count_every_tile() {
        // 17 users need two tiles, which save 15 reads and cost 34 partial sums and 2 starts.
        assert_eq!(SIZES.saved_bytes(17, 100), 15 * 100 * 512 - 34 * 4000 - 40_000);
    }

    #[test]
    fn splits_cover_all_keys_and_are_at_most_twice_as_long_as_asked() {
        for keys in 0..2000 {
            for split_keys in [128, 192, 1024] {
                let (count, len) = num_splits(keys, split_keys);
                let found: Vec<[usize; 2]> = split_ranges(keys, split_keys).collect();
                assert!(found.len() == count && len <= 2 * split_keys);
                assert!(count <= (keys / split_keys).max(1));
                assert!(found[0][0] == 0 && found[count - 1][1] == keys);
                assert!(found.windows(2).all(|pair| pair[0][1] == pair[1][0]));
                assert!(keys == 0 || found.iter().all(|[low, high]| low < high));
            }
        }
    }

    #[test]
    fn splits_fill_the_device_and_have_a_minimum_length() {
        assert_eq!(
            [0, 1280, 1281, 1921].map(|keys| SIZES.keys_per_split(keys)),
            [128, 128, 192, 256]
        );
    }
}
