//! The scheduler under random requests, steps, loads, commits and cancellations. Allocations never overlap, nothing
//! leaks, every request ends, and the tables of a step fit into its buffer.
#![expect(clippy::expect_used, reason = "a test may fail")]

mod model;
mod small_arena;

use model::Model;
use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{PrefixPart, PrefixShape, Request, Scheduler, SchedulerConfig};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use small_arena::{request, scheduler_config};

fn proptest_config() -> ProptestConfig {
    ProptestConfig {
        cases: 192,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(4),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(proptest_config())]

    #[test]
    fn every_request_ends_and_nothing_overlaps_or_leaks(
        users in 0..4_usize, fill in 1..40_usize, costs in prop::sample::select(vec![0_usize, 100, 100_000]),
        padded in any::<bool>(),
        prefix_rows in prop::sample::select(vec![usize::MAX, 160, 112]),
        max_batched_tokens in prop::sample::select(vec![50, 8, 5]),
        layers in prop::collection::vec(prop_oneof![Just(Vec::new()), prop::collection::vec(any::<bool>(), 3)], 6),
        calls in prop::collection::vec(
            (
                0..14_u8, prop::sample::subsequence(vec![0_i64, 1, 2, 3, 4, 5], 0..3), 1..150_usize, 1..4_usize,
                1..20_usize,
            ),
            1..60,
        ),
    ) {
        let decode = DecodeSizes {
            users, fill, key_bytes: 512, part_bytes: costs, item_bytes: costs, launch_bytes: costs, padded,
        };
        let config = SchedulerConfig { decode, prefix_rows, max_batched_tokens, ..scheduler_config() };
        let mut model = Model::new(config, &[30, 16, 1, 0, 100, 47], layers);
        let mut id = 0;
        for (kind, prefixes, prompt_len, beams, max_new) in calls {
            match kind {
                0..=4 => {
                    id += 1;
                    let priority = i64::from(kind) / 4;
                    let deadline = if prompt_len % 7 == 0 { i64::from(kind) * 9 } else { i64::MAX };
                    let tenant = i64::from(kind) % 3;
                    let request = request(id, &prefixes, prompt_len, beams, max_new);
                    model.add(Request { priority, deadline, tenant, ..request });
                }
                5 => model.cancel(i64::try_from(prompt_len).expect("small") % (id + 1)),
                6..=7 => model.finish_load(prompt_len),
                12..=13 => model.pin_load_or_evict(i64::try_from(prompt_len % 6).expect("small"), max_new),
                _ => model.step(max_new),
            }
        }
        model.drain();
    }

    #[test]
    fn buffer_len_suffices(
        requests in prop::collection::vec((prop_oneof![1..9_usize, 1..400_usize], 1..9_usize), 1..40),
        max_batched_tokens in 8..600_usize, tile_rows in 0..3_usize, buckets in 1..5_usize, prefixes in 0..4_usize,
        users in 0..20_usize, fill in prop_oneof![1..9_usize, 1..900_usize], padded in any::<bool>(),
        layers in prop::collection::vec(prop_oneof![Just(Vec::new()), prop::collection::vec(any::<bool>(), 5)], 4),
        folds in prop_oneof![Just(None), Just(Some(vec![0; 5])), Just(Some(vec![0, 0, 1, 1, 2]))],
    ) {
        let padded = padded && folds.is_none();
        let decode = DecodeSizes { users, fill, key_bytes: 1, padded, ..DecodeSizes::default() };
        let arena_rows = 1 << 20;
        let config = SchedulerConfig {
            arena_rows, max_rows: 40, max_batched_tokens, tile_rows, buckets, prefix_rows: arena_rows, decode,
        };
        let has_encoder = folds.is_some();
        let mut scheduler = folds.map_or_else(|| Scheduler::new(config), |folds| Scheduler::with_encoder(config, folds))
            .expect("a scheduler");
        for (prefix, layers) in (0..).zip(&layers) {
            if has_encoder {
                let shape = PrefixShape { rows: 80, pos_start: 16, slides: true, place: Place::Front };
                let parts = [0, 16, 32].map(|offset| PrefixPart { offset, rows: 16, layers });
                scheduler.register_parts(prefix, shape, parts).expect("a new number");
            } else {
                scheduler.register_prefix(prefix, 16, 16, true, Place::Front, layers).expect("a new number");
            }
        }
        for (id, (len, beams)) in (0..).zip(requests) {
            let (encoder_len, prompt_len) = if has_encoder { (len, 1 + len % 3) } else { (0, len) };
            let request = request(id, &[0, 1, 2, 3][..prefixes], prompt_len, beams, 2);
            let is_added = scheduler.add(Request { encoder_len, ..request }).is_ok();
            prop_assert!(is_added || has_encoder && encoder_len + prompt_len > max_batched_tokens / 4);
        }
        let mut out = vec![0; scheduler.buffer_len()];
        while scheduler.num_waiting() + scheduler.num_running() > 0 {
            let header = scheduler.plan_step(0, &mut out).expect("a step");
            for (prefix, _) in &header.loads {
                scheduler.prefix_ready(*prefix).expect("it was loading");
            }
            scheduler.commit(&header.decode_ids).expect("a commit");
        }
    }
}
