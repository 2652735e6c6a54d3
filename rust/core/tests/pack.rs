//! Packing: a permutation of the examples, whole batches within the budget, and weights that sum to one.
#![expect(clippy::expect_used, reason = "a test may fail")]

use prefixfast_core::Error;
use prefixfast_core::batch::pack::{Examples, Packing, pack};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 256,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(2),
        ..ProptestConfig::default()
    }
}

fn micro_batches(packing: &Packing) -> Vec<Vec<usize>> {
    let border = |at: i32| usize::try_from(at).expect("a border");
    let micro = |pair: &[i32]| {
        packing.order[border(pair[0])..border(pair[1])]
            .iter()
            .map(|at| border(*at))
            .collect()
    };
    packing.micro_indptr.windows(2).map(micro).collect()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn packing_is_valid_first_fit_and_deterministic(
        examples in prop::collection::vec((1..40_i32, 1..40_i32, 0..3_i32), 0..60),
        budget in 1..100_u64, sequence_sum: bool,
    ) {
        let lengths: Vec<i32> = examples.iter().map(|(len, ..)| *len).collect();
        let targets: Vec<i32> = examples.iter().map(|(len, targets, _)| *targets.min(len)).collect();
        let batch: Vec<i32> = examples
            .iter()
            .scan(-3, |at, (_, _, jump)| { *at += i32::from(*jump == 2); Some(*at) })
            .collect();
        let examples = Examples { lengths: &lengths, targets: &targets, batch: &batch };
        let packing = pack(examples, budget, sequence_sum).expect("a packing");
        prop_assert_eq!(&packing, &pack(examples, budget, sequence_sum).expect("the same"));

        let mut all = packing.order.clone();
        all.sort_unstable();
        prop_assert!(all.iter().zip(0..).all(|(found, at)| *found == at) && all.len() == lengths.len());
        let tokens = |micro: &[usize]| micro.iter().map(|at| u64::from(lengths[*at].unsigned_abs())).sum::<u64>();
        let size = |number: i32| {
            let mine = (0..batch.len()).filter(|at| batch[*at] == number);
            mine.map(|at| u64::from(lengths[at].unsigned_abs())).sum::<u64>()
        };
        let micro_batches = micro_batches(&packing);
        for micro in &micro_batches {
            prop_assert!(!micro.is_empty() && micro.is_sorted());
            prop_assert!(micro.len() == 1 || tokens(micro) <= budget);
        }
        for number in &batch {
            let homes: Vec<&Vec<usize>> = micro_batches
                .iter()
                .filter(|micro| micro.iter().any(|at| batch[*at] == *number))
                .collect();
            if size(*number) <= budget {
                prop_assert_eq!(homes.len(), 1);
            } else {
                prop_assert!(homes.iter().all(|micro| micro.iter().all(|at| batch[*at] == *number)));
                prop_assert!(homes.windows(2).all(|pair| pair[0].last() < pair[1].first()));
            }
            let mine = (0..batch.len()).filter(|at| batch[*at] == *number);
            let (count, weight) = mine.fold((0.0, 0.0), |(count, sum), at| {
                let tokens = if sequence_sum { 1.0 } else { f64::from(targets[at]) };
                (count + 1.0, sum + packing.weight[at] * tokens)
            });
            prop_assert!(count > 0.0 && (weight - 1.0_f64).abs() < 1e-9);
        }
        // First-fit leaves at most one micro-batch of whole batches that is at most half full.
        let whole = micro_batches.iter().filter(|micro| size(batch[micro[0]]) <= budget);
        prop_assert!(whole.filter(|micro| 2 * tokens(micro) <= budget).count() <= 1);
    }
}

#[test]
fn invalid_inputs_are_refused() {
    let no_targets = Examples {
        lengths: &[1, 1],
        targets: &[0, 0],
        batch: &[4, 4],
    };
    assert!(matches!(pack(no_targets, 8, false), Err(Error::Data(text)) if text.contains("batch 4 (examples 0 to 1)")));
    for (lengths, targets, batch, budget) in [
        (&[1][..], &[1][..], &[0, 1][..], 8),
        (&[0], &[0], &[0], 8),
        (&[2], &[3], &[0], 8),
        (&[2], &[-1], &[0], 8),
        (&[2, 2], &[1, 1], &[1, 0], 8),
        (&[2], &[1], &[0], 0),
    ] {
        assert!(
            matches!(
                pack(
                    Examples {
                        lengths,
                        targets,
                        batch
                    },
                    budget,
                    true
                ),
                Err(Error::Config(_))
            ),
            "{lengths:?}"
        );
    }
}
