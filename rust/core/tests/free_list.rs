//! The free list: allocations never overlap, nothing leaks, and freed neighbours merge.
#![expect(clippy::expect_used, reason = "a test may fail")]

use std::cmp::Reverse;

use prefixfast_core::batch::free_list::{FreeList, Run};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const SIZE: usize = 64;

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 256,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::default()
    }
}

/// Lengths of the free runs, longest first.
fn free_runs(used: &[bool]) -> Vec<usize> {
    let mut runs: Vec<usize> = used
        .split(|used| *used)
        .map(<[bool]>::len)
        .filter(|len| *len > 0)
        .collect();
    runs.sort_unstable_by_key(|len| Reverse(*len));
    runs
}

/// Whether some choice of at most three of the free runs holds `len` units. All but the last hold multiples of 4.
fn fits_few(runs: &[usize], len: usize) -> bool {
    let floor = |at: usize| runs[at] / 4 * 4;
    let all = || 0..runs.len();
    let pairs = || all().flat_map(|a| all().filter(move |b| a != *b).map(move |b| (a, b)));
    all().any(|a| runs[a] >= len)
        || pairs().any(|(a, b)| floor(a) + runs[b] >= len)
        || pairs().any(|(a, b)| all().any(|c| c != a && c != b && floor(a) + floor(b) + runs[c] >= len))
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn allocations_never_overlap_and_nothing_leaks(
        steps in prop::collection::vec((0..5_u8, 0..20_usize, any::<prop::sample::Index>()), 1..120),
    ) {
        let mut list = FreeList::new(SIZE);
        let mut held: Vec<Run> = Vec::new();
        let mut used = [false; SIZE];
        for (kind, len, pick) in steps {
            let taken = match kind {
                0 if len > 0 => list.allocate_low(len).map(|run| vec![run]),
                1 => list.allocate_high(len),
                4 => {
                    let longest = free_runs(&used);
                    let found = list.allocate_few(len, 4, 3);
                    prop_assert_eq!(found.is_some(), len > 0 && fits_few(&longest, len));
                    if let Some(runs) = &found {
                        let is_single = longest[0] >= len;
                        prop_assert!(runs.len() == 1 || runs.len() <= 3 && !is_single);
                        prop_assert!(runs.iter().rev().skip(1).all(|run| run.len.is_multiple_of(4)));
                    }
                    found
                }
                2 if len > 0 => {
                    let run = Run { start: pick.index(SIZE), len };
                    let free = run.start + len <= SIZE && !used[run.start..run.start + len].contains(&true);
                    prop_assert_eq!(list.allocate_exact(run), free);
                    free.then(|| vec![run])
                }
                _ => {
                    if !held.is_empty() {
                        let run = held.swap_remove(pick.index(held.len()));
                        used[run.start..run.start + run.len].fill(false);
                        list.free(run);
                    }
                    None
                }
            };
            if let (1 | 4, Some(runs)) = (kind, &taken) {
                prop_assert_eq!(runs.iter().map(|run| run.len).sum::<usize>(), len);
            }
            for run in taken.unwrap_or_default() {
                prop_assert!(!used[run.start..run.start + run.len].contains(&true));
                used[run.start..run.start + run.len].fill(true);
                held.push(run);
            }
            let free = used.iter().filter(|used| !**used).count();
            prop_assert_eq!(list.num_free(), free);
            prop_assert_eq!(list.clone().allocate_high(free).is_some(), free > 0);
        }
        for run in held {
            list.free(run);
        }
        prop_assert_eq!(list, FreeList::new(SIZE));
    }
}

#[test]
fn allocate_high_prefers_a_single_run() {
    let mut list = FreeList::new(10);
    assert!(list.allocate_exact(Run { start: 7, len: 1 }));
    assert_eq!(list.allocate_high(2), Some(vec![Run { start: 8, len: 2 }]));
    assert_eq!(list.allocate_high(3), Some(vec![Run { start: 4, len: 3 }]));
    assert_eq!(list.allocate_low(1).expect("room"), Run { start: 0, len: 1 });
}

#[test]
fn allocate_few_takes_whole_chunks_of_the_longest_runs() {
    let mut list = FreeList::new(32);
    for start in [7, 12, 22] {
        assert!(list.allocate_exact(Run { start, len: 1 }));
    }
    // Runs of 7, 4, 9 and 9 units are free.
    assert_eq!(
        list.clone().allocate_few(9, 4, 3),
        Some(vec![Run { start: 23, len: 9 }])
    );
    let expected = [(24, 8), (14, 8), (1, 6)].map(|(start, len)| Run { start, len });
    assert_eq!(list.clone().allocate_few(22, 4, 3), Some(expected.to_vec()));
    let before = list.clone();
    assert_eq!((list.allocate_few(24, 4, 3), list.allocate_few(18, 4, 2)), (None, None));
    assert_eq!(list, before);
}
