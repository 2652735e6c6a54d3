//! The free list: allocations never overlap, nothing leaks, and freed neighbours merge.
#![expect(clippy::expect_used, reason = "a test may fail")]

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

proptest! {
    #![proptest_config(config())]

    #[test]
    fn allocations_never_overlap_and_nothing_leaks(
        steps in prop::collection::vec((0..4_u8, 0..20_usize, any::<prop::sample::Index>()), 1..120),
    ) {
        let mut list = FreeList::new(SIZE);
        let mut held: Vec<Run> = Vec::new();
        let mut used = [false; SIZE];
        for (kind, len, pick) in steps {
            let taken = match kind {
                0 if len > 0 => list.allocate_low(len).map(|run| vec![run]),
                1 => list.allocate_high(len),
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
            if let (1, Some(runs)) = (kind, &taken) {
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
