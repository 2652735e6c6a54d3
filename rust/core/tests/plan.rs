//! The tables of a packed forward against a naive implementation.
#![expect(clippy::expect_used, reason = "a test may fail")]

use std::collections::BTreeSet;

use prefixfast_core::batch::plan::{PackedInputs, TileSizes, plan_packed};
use prefixfast_core::batch::table_buffer::{ALIGN, TableBuffer};
use prefixfast_core::{Error, Limit};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// First row, rows, `pos_start`, slides and place. The last two are infixes.
const PREFIX_ROWS: [[i32; 5]; 6] = [
    [0, 3, 3, 1, 0],
    [16, 0, 7, 0, 0],
    [32, 5, 0, 0, 0],
    [48, 20, 20, 1, 0],
    [80, 6, 6, 1, 1],
    [96, 2, 9, 1, 2],
];

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 256,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(3),
        ..ProptestConfig::default()
    }
}

fn at(value: i32) -> usize {
    usize::try_from(value).expect("an index")
}

fn table<'a>(tables: &'a TableBuffer, name: &str) -> &'a [i32] {
    tables.get(name).expect("a section")
}

fn rows<const C: usize>(tables: &TableBuffer, name: &str) -> Vec<[i32; C]> {
    table(tables, name).as_chunks::<C>().0.to_vec()
}

/// Entries of the user tables: query row, first row of the block, position of the block relative to the query, slides.
fn naive_users(lengths: &[i32], prefixes: &[Vec<i32>], splits: &[i32]) -> BTreeSet<[i32; 4]> {
    let mut found = BTreeSet::new();
    let mut row = 0;
    for ((len, prefixes), split) in lengths.iter().zip(prefixes).zip(splits) {
        for query in 0..*len {
            let mut end = 0;
            for number in prefixes.iter().rev() {
                let [first, rows, _, slides, place] = PREFIX_ROWS[at(*number)];
                if place > 0 && query < *split {
                    continue;
                }
                end -= rows;
                if rows > 0 {
                    found.insert([row + query, first, end - query, slides]);
                }
            }
        }
        row += len;
    }
    found
}

fn check_users(tables: &TableBuffer, expected: &BTreeSet<[i32; 4]>) {
    let (blocks, indptr): (Vec<[i32; 2]>, _) = (rows(tables, "block"), table(tables, "user_indptr"));
    let (user, pos, slides) = (
        table(tables, "user"),
        table(tables, "user_pos"),
        table(tables, "user_slides"),
    );
    let mut found = BTreeSet::new();
    for ((block, border), span) in blocks.iter().zip(indptr.windows(2)).zip(rows::<3>(tables, "span")) {
        let mine = at(border[0])..at(border[1]);
        assert!(user[mine.clone()].is_sorted() && !mine.is_empty());
        let consecutive = user[mine.clone()].windows(2).all(|pair| pair[1] == pair[0] + 1);
        assert_eq!(span, [user[mine.start], border[1] - border[0], i32::from(consecutive)]);
        found.extend(mine.map(|place| [user[place], block[0], pos[place], slides[place]]));
    }
    assert_eq!(&found, expected);
    assert_eq!(found.len(), user.len());
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn matches_the_naive_implementation(
        sequences in prop::collection::vec(
            (1..30_i32, prop::sample::subsequence(vec![0, 4, 1, 2, 5, 3], 0..5), 0..30_i32), 0..20),
        queries in 0..9_usize, keys in 0..9_usize, block_rows in 0..9_usize, buckets in 1..6_usize,
    ) {
        let lengths: Vec<i32> = sequences.iter().map(|(len, ..)| *len).collect();
        let splits: Vec<i32> = sequences.iter().map(|(len, _, split)| split % len).collect();
        let prefixes: Vec<Vec<i32>> = sequences.into_iter().map(|(_, prefixes, _)| prefixes).collect();
        let mut indptr = vec![0];
        indptr.extend(prefixes.iter().scan(0, |sum, list| {
            *sum += i32::try_from(list.len()).expect("few");
            Some(*sum)
        }));
        let prefix = prefixes.concat();
        let input = PackedInputs {
            lengths: &lengths,
            last_prompt_token: &splits,
            prefix_indptr: &indptr,
            prefix: &prefix,
            prefix_rows: &PREFIX_ROWS,
            tiles: TileSizes { queries, keys, prefix_rows: block_rows },
            buckets,
            key_lengths: None,
            padded: true,
        };
        let (tables, reach) = plan_packed(&input).expect("a plan");
        prop_assert!(tables.sections.iter().all(|section| section.offset % ALIGN == 0));
        check_users(&tables, &naive_users(&lengths, &prefixes, &splits));

        let total = |list: &Vec<i32>| list.iter().map(|number| PREFIX_ROWS[at(*number)][1]).sum::<i32>();
        prop_assert_eq!(reach, lengths.iter().zip(&prefixes).map(|(len, list)| len + total(list)).max().unwrap_or(0));
        let blocks: BTreeSet<i32> = prefix.iter().copied().filter(|number| *number != 1).collect();
        let rows_of = |number: &i32| [PREFIX_ROWS[at(*number)][0], PREFIX_ROWS[at(*number)][1]];
        let expected: Vec<[i32; 2]> = blocks.iter().map(rows_of).collect();
        prop_assert_eq!(rows::<2>(&tables, "block"), expected);

        let (gather, scatter) = (table(&tables, "gather"), table(&tables, "scatter"));
        prop_assert!(scatter.iter().zip(0..).all(|(place, token)| gather[at(*place)] == token));
        let layout = rows::<2>(&tables, "bucket");
        prop_assert!(layout.len() <= buckets && layout.is_sorted_by_key(|bucket| bucket[1]));
        let padded_tokens = layout.iter().map(|[count, len]| count * len).sum::<i32>();
        prop_assert_eq!(padded_tokens, i32::try_from(gather.len()).expect("few"));
        let num_sequences = layout.iter().map(|[count, _]| *count).sum::<i32>();
        prop_assert_eq!(num_sequences, i32::try_from(lengths.len()).expect("few"));
        prop_assert_eq!(scatter.len(), at(lengths.iter().sum()));
        let mut tiled = vec![0; scatter.len()];
        for [segment, first] in rows::<2>(&tables, "tiles") {
            let [start, len, ..] = rows::<4>(&tables, "seg")[at(segment)];
            let end = (first + i32::try_from(queries).expect("few")).min(start + len);
            tiled[at(first)..at(end)].iter_mut().for_each(|count| *count += 1);
        }
        prop_assert!(tiled.iter().all(|count| *count == i32::from(queries > 0)));
        let mut tiled = vec![0; scatter.len()];
        for [segment, past, key] in rows::<3>(&tables, "key_tiles") {
            let seg = rows::<4>(&tables, "seg");
            let [_, _, start, count] = seg[at(past) - 1];
            prop_assert!(seg[at(segment)..at(past)].iter().all(|other| other[2] == start));
            prop_assert!(seg.get(at(past)).is_none_or(|next| next[2] != start));
            let end = (key + i32::try_from(keys).expect("few")).min(count);
            tiled[at(start + key)..at(start + end)].iter_mut().for_each(|count| *count += 1);
        }
        prop_assert!(tiled.iter().all(|count| *count == i32::from(keys > 0)));
        let blocks = rows::<2>(&tables, "block");
        let expected: Vec<[i32; 2]> = blocks.iter().zip(0..).flat_map(|([_, count], block)| {
            (0..if block_rows == 0 { 0 } else { *count })
                .filter(|row| at(*row).is_multiple_of(block_rows.max(1)))
                .map(move |row| [block, row])
                .collect::<Vec<_>>()
        }).collect();
        prop_assert_eq!(rows::<2>(&tables, "block_tiles"), expected);
        let mut row = 0;
        for [first, count, key, keys] in rows::<4>(&tables, "seg") {
            prop_assert_eq!((first, count > 0, keys), (row, true, first + count - key));
            row += count;
        }
        let positions = lengths.iter().zip(&prefixes).zip(&splits).flat_map(|((len, list), split)| {
            let largest = |places: &[i32]| {
                let chosen = list.iter().map(|number| PREFIX_ROWS[at(*number)]).filter(|row| places.contains(&row[4]));
                chosen.map(|row| row[2]).max().unwrap_or(0)
            };
            let is_fixed = list.contains(&5);
            let (front, gap, split) = (largest(&[0]), largest(&[1, 2]), *split);
            (0..*len).map(move |token| {
                let start = if is_fixed { -split } else { front };
                start + token + if token < split { 0 } else { gap }
            })
        });
        prop_assert_eq!(table(&tables, "position_ids"), positions.collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(config())]

    /// Cross-attention: each sequence reads a number of keys of its own. Encoder: the keys are the tokens, and no
    /// padded layout is made.
    #[test]
    fn given_keys_match_the_naive_implementation(
        sequences in prop::collection::vec(
            (1..30_i32, 1..40_i32, prop::sample::subsequence(vec![0, 1, 2, 3], 0..4)), 0..20),
        given in any::<bool>(), queries in 0..9_usize, keys in 0..9_usize,
    ) {
        let lengths: Vec<i32> = sequences.iter().map(|(len, ..)| *len).collect();
        let key_lengths: Vec<i32> = sequences.iter().map(|(len, keys, _)| if given { *keys } else { *len }).collect();
        let prefixes: Vec<Vec<i32>> = sequences.into_iter().map(|(.., prefixes)| prefixes).collect();
        let mut indptr = vec![0];
        for list in &prefixes {
            indptr.push(indptr[indptr.len() - 1] + i32::try_from(list.len()).expect("few"));
        }
        let zeros = vec![0; lengths.len()];
        let own = PackedInputs {
            lengths: &lengths,
            last_prompt_token: &zeros,
            prefix_indptr: &indptr,
            prefix: &prefixes.concat(),
            prefix_rows: &PREFIX_ROWS[..4],
            tiles: TileSizes { queries, keys, prefix_rows: 4 },
            buckets: 3,
            key_lengths: None,
            padded: true,
        };
        let input = PackedInputs { key_lengths: given.then_some(&key_lengths), padded: false, ..own };
        let (tables, reach) = plan_packed(&input).expect("a plan");
        let (mut row, mut key) = (0, 0);
        let (mut expected, mut key_tiles) = (Vec::new(), Vec::new());
        for ((len, keys_here), number) in lengths.iter().zip(&key_lengths).zip(0..) {
            expected.push([row, *len, key, *keys_here]);
            if keys > 0 {
                key_tiles.extend((0..*keys_here).step_by(keys).map(|tile| [number, number + 1, tile]));
            }
            row += len;
            key += keys_here;
        }
        prop_assert_eq!(rows::<4>(&tables, "seg"), expected);
        prop_assert_eq!(rows::<3>(&tables, "key_tiles"), key_tiles);
        prop_assert!(["bucket", "gather", "scatter"].iter().all(|name| table(&tables, name).is_empty()));
        let total = |list: &Vec<i32>| list.iter().map(|number| PREFIX_ROWS[at(*number)][1]).sum::<i32>();
        let longest = key_lengths.iter().zip(&prefixes).map(|(keys, list)| keys + total(list)).max();
        prop_assert_eq!(reach, longest.unwrap_or(0));
        // The other tables are those of the same queries with keys of their own.
        let (causal, _) = plan_packed(&own).expect("a plan");
        for section in &causal.sections {
            if !["seg", "key_tiles", "bucket", "gather", "scatter"].contains(&section.name) {
                prop_assert_eq!(table(&tables, section.name), table(&causal, section.name), "{}", section.name);
            }
        }
        prop_assert_eq!(tables.sections.len(), causal.sections.len());
    }
}

/// Inputs of one sequence with one prefix.
const GOOD: PackedInputs<'static> = PackedInputs {
    lengths: &[3],
    last_prompt_token: &[0],
    prefix_indptr: &[0, 1],
    prefix: &[0],
    prefix_rows: &PREFIX_ROWS,
    tiles: TileSizes {
        queries: 0,
        keys: 0,
        prefix_rows: 0,
    },
    buckets: 4,
    key_lengths: None,
    padded: true,
};

#[test]
fn invalid_inputs_are_refused() {
    let good = GOOD;
    assert!(plan_packed(&good).is_ok());
    for wrong in [
        PackedInputs { lengths: &[0], ..good },
        PackedInputs {
            prefix_indptr: &[0],
            ..good
        },
        PackedInputs {
            prefix_indptr: &[0, 2],
            ..good
        },
        PackedInputs {
            prefix_indptr: &[-1, 1],
            ..good
        },
        PackedInputs {
            prefix_rows: &[[0, -1, 0, 0, 0]],
            ..good
        },
        PackedInputs {
            prefix_rows: &[[0, 1, 0, 2, 0]],
            ..good
        },
        PackedInputs {
            prefix_rows: &[[0, 1, 0, 1, 3]],
            ..good
        },
        PackedInputs {
            last_prompt_token: &[3],
            ..good
        },
        PackedInputs {
            last_prompt_token: &[-1],
            ..good
        },
        PackedInputs {
            last_prompt_token: &[0, 0],
            ..good
        },
        PackedInputs { buckets: 0, ..good },
    ] {
        assert!(matches!(plan_packed(&wrong), Err(Error::Config(_))), "{wrong:?}");
    }
    let long = PackedInputs {
        lengths: &[i32::MAX],
        ..good
    };
    let (needed, available) = (2_147_483_650, 2_147_483_647);
    assert_eq!(
        plan_packed(&long).err(),
        Some(Error::Capacity {
            limit: Limit::SequenceKeys,
            needed,
            available
        })
    );
    for prefix in [-1, 6] {
        assert_eq!(
            plan_packed(&PackedInputs {
                prefix: &[prefix],
                ..good
            })
            .err(),
            Some(Error::UnknownPrefix(i64::from(prefix)))
        );
    }
}

#[test]
fn invalid_keys_are_refused() {
    let good = PackedInputs {
        key_lengths: Some(&[3]),
        prefix_rows: PREFIX_ROWS.first_chunk::<4>().expect("rows"),
        ..GOOD
    };
    assert!(plan_packed(&good).is_ok());
    for wrong in [
        PackedInputs {
            key_lengths: Some(&[]),
            ..good
        },
        PackedInputs {
            key_lengths: Some(&[0]),
            ..good
        },
        PackedInputs {
            key_lengths: Some(&[3, 3]),
            ..good
        },
        PackedInputs {
            prefix_rows: &[[0, 1, 0, 1, 1]],
            ..good
        },
    ] {
        assert!(matches!(plan_packed(&wrong), Err(Error::Config(_))), "{wrong:?}");
    }
    let wide = PackedInputs {
        lengths: &[1, 1],
        last_prompt_token: &[0, 0],
        prefix_indptr: &[0, 0, 0],
        prefix: &[],
        prefix_rows: &[],
        key_lengths: Some(&[1 << 30, 1 << 30]),
        padded: false,
        ..good
    };
    let (limit, needed, available) = (Limit::PackedKeys, 1 << 30, 1 << 27);
    assert_eq!(
        plan_packed(&wide).err(),
        Some(Error::Capacity {
            limit,
            needed,
            available
        })
    );
}
