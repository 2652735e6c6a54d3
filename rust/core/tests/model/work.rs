//! Checks of the work tables: every key of every row is read once, and every partial sum is written once and merged
//! once.

use std::collections::BTreeMap;

use super::{at, table};
use prefixfast_core::batch::table_buffer::Section;

/// Key range of a partial sum: block, or -1 for the own keys of the row, first key, end key.
type KeyRange = (i32, i32, i32);

pub(crate) fn check_work(out: &[i32], view: &[Section]) {
    let get = |name: &str| table(out, view, name);
    let (lens, indptr, grouped_rows) = (get("lens"), get("use_indptr"), get("user"));
    let (uses, blocks) = (get("use").as_chunks::<3>().0, get("block").as_chunks::<2>().0);
    let mut expected: Vec<Vec<KeyRange>> = Vec::new();
    for (row, len) in lens.iter().enumerate() {
        let mine = &uses[at(indptr[row])..at(indptr[row + 1])];
        let mut keys: Vec<KeyRange> = mine
            .iter()
            .map(|[block, ..]| (*block, 0, blocks[at(*block)][1]))
            .collect();
        keys.push((-1, 0, *len));
        keys.sort_unstable();
        expected.push(keys);
    }
    let mut found: Vec<Vec<KeyRange>> = vec![Vec::new(); lens.len()];
    let mut parts: BTreeMap<i32, (usize, Vec<KeyRange>)> = BTreeMap::new();
    for [block, first, count, low, high, part] in get("work").as_chunks::<6>().0 {
        if *block >= 0 {
            assert!(at(*count) >= 1 && get("grouped")[at(*block)] == 1);
            for (row, part) in grouped_rows[at(*first)..at(*first + *count)].iter().zip(*part..) {
                assert!(parts.insert(part, (at(*row), vec![(*block, *low, *high)])).is_none());
            }
        } else if *count > 0 {
            let keys = keys_read_alone(
                &uses[at(indptr[at(*first)])..at(indptr[at(*first) + 1])],
                blocks,
                get("grouped"),
                lens[at(*first)],
                (*low, *high),
            );
            if *part < 0 {
                assert!(found[at(*first)].is_empty(), "a result is written twice");
                found[at(*first)] = keys;
            } else {
                assert!(parts.insert(*part, (at(*first), keys)).is_none());
            }
        }
    }
    let (part_indptr, order) = (get("part_indptr"), get("part"));
    for (row, found) in found.iter_mut().enumerate() {
        let mine = &order[at(part_indptr[row])..at(part_indptr[row + 1])];
        assert!(
            found.is_empty() || mine.is_empty(),
            "a result is both written and merged"
        );
        for part in mine {
            assert!(at(*part) < order.len(), "a partial sum is out of range");
            let (owner, keys) = parts.remove(part).expect("a partial sum");
            assert_eq!(owner, row);
            found.extend(keys);
        }
    }
    assert!(parts.is_empty(), "a partial sum is not merged");
    assert_eq!(
        found.into_iter().map(merge_adjacent).collect::<Vec<_>>(),
        expected.into_iter().map(merge_adjacent).collect::<Vec<_>>()
    );
}

/// Key ranges that an item of a single row reads. Its range counts the keys of the blocks that no group reads, then the
/// own keys of the row.
fn keys_read_alone(
    uses: &[[i32; 3]],
    blocks: &[[i32; 2]],
    grouped: &[i32],
    len: i32,
    (low, high): (i32, i32),
) -> Vec<KeyRange> {
    let read = uses
        .iter()
        .filter(|[block, ..]| grouped[at(*block)] == 0)
        .map(|[block, ..]| (*block, blocks[at(*block)][1]));
    let mut base = 0;
    let mut keys = Vec::new();
    for (block, rows) in read.chain([(-1, len)]) {
        let (first, last) = ((low - base).max(0), (high - base).min(rows));
        if first < last {
            keys.push((block, first, last));
        }
        base += rows;
    }
    assert!(high <= base, "an item reads past the last key");
    keys
}

/// Merges adjacent ranges of the same block. Overlapping ranges stay separate.
fn merge_adjacent(mut ranges: Vec<KeyRange>) -> Vec<KeyRange> {
    ranges.retain(|(_, first, last)| first < last);
    ranges.sort_unstable();
    let mut out: Vec<KeyRange> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.0 == range.0 && last.2 == range.1 => last.2 = range.2,
            _ => out.push(range),
        }
    }
    out
}
