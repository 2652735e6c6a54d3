//! Free space never overlaps, never leaks, and grows together again.
#![expect(clippy::expect_used, reason = "a test may fail")]

use prefixfast_core::batch::free_list::{Run, Slots};
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
    fn keeps_the_books(steps in prop::collection::vec((0..4_u8, 0..20_usize, any::<prop::sample::Index>()), 1..120)) {
        let mut slots = Slots::new(SIZE);
        let mut held: Vec<Run> = Vec::new();
        let mut used = [false; SIZE];
        for (kind, len, pick) in steps {
            let taken = match kind {
                0 if len > 0 => slots.take_low(len).map(|run| vec![run]),
                1 => slots.take_high(len),
                2 if len > 0 => {
                    let run = Run { start: pick.index(SIZE), len };
                    let free = run.start + len <= SIZE && !used[run.start..run.start + len].contains(&true);
                    prop_assert_eq!(slots.take(run), free);
                    free.then(|| vec![run])
                }
                _ => {
                    if !held.is_empty() {
                        let run = held.swap_remove(pick.index(held.len()));
                        used[run.start..run.start + run.len].fill(false);
                        slots.give(run);
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
            prop_assert_eq!(slots.free(), free);
            prop_assert_eq!(slots.clone().take_high(free).is_some(), free > 0);
        }
        for run in held {
            slots.give(run);
        }
        prop_assert_eq!(slots, Slots::new(SIZE));
    }
}

#[test]
fn prefers_one_run_at_the_top() {
    let mut slots = Slots::new(10);
    assert!(slots.take(Run { start: 7, len: 1 }));
    assert_eq!(slots.take_high(2), Some(vec![Run { start: 8, len: 2 }]));
    assert_eq!(slots.take_high(3), Some(vec![Run { start: 4, len: 3 }]));
    assert_eq!(slots.take_low(1).expect("room"), Run { start: 0, len: 1 });
}
