//! The scheduler under random requests, steps, loads, commits and cancellations: allocations never overlap, nothing
//! leaks, and every request ends.
#![expect(clippy::expect_used, reason = "a test may fail")]

mod model;

use model::Model;
use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{PrefixPart, PrefixShape, Request, Scheduler, SchedulerConfig};
use prefixfast_core::{Error, Limit};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

fn proptest_config() -> ProptestConfig {
    ProptestConfig {
        cases: 192,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(4),
        ..ProptestConfig::default()
    }
}

fn scheduler_config() -> SchedulerConfig {
    SchedulerConfig {
        arena_rows: 64 + 16 * 20 + 5,
        max_rows: 7,
        max_batched_tokens: 50,
        tile_rows: 4,
        buckets: 3,
        prefix_rows: usize::MAX,
        decode: DecodeSizes::default(),
    }
}

fn request(id: i64, prefixes: &[i64], prompt_len: usize, beams: usize, max_new: usize) -> Request {
    Request {
        id,
        prefixes: prefixes.into(),
        encoder_len: 0,
        prompt_len,
        beams,
        max_new,
        tenant: 0,
        priority: 0,
        deadline: i64::MAX,
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
}

/// Ids of all requests in the order of their prefill. Each request is decoded once.
fn prefill_order(scheduler: &mut Scheduler) -> Vec<i64> {
    let mut out = vec![0; scheduler.buffer_len()];
    let mut order = Vec::new();
    while scheduler.num_running() + scheduler.num_waiting() > 0 {
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        order.extend(&header.prefill_ids);
        scheduler.commit(&header.decode_ids).expect("a commit");
    }
    order
}

#[test]
fn requests_are_ordered_by_priority_then_arrival() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_rows: 1,
        ..scheduler_config()
    })
    .expect("a scheduler");
    for (id, priority) in [(1, 0), (2, 5), (3, 5)] {
        scheduler
            .add(Request {
                priority,
                ..request(id, &[], 3, 1, 2)
            })
            .expect("room");
    }
    assert_eq!(prefill_order(&mut scheduler), [2, 3, 1]);
}

#[test]
fn tenants_get_equal_service() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_rows: 1,
        ..scheduler_config()
    })
    .expect("a scheduler");
    for id in 0..12 {
        let tenant = i64::from(id >= 10);
        scheduler
            .add(Request {
                tenant,
                ..request(id, &[], 3, 1, 2)
            })
            .expect("room");
    }
    assert_eq!(prefill_order(&mut scheduler), [0, 10, 1, 11, 2, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn a_long_prompt_is_prefilled_in_chunks_beside_decode_rows() {
    let mut scheduler = Scheduler::new(scheduler_config()).expect("a scheduler");
    scheduler.add(request(1, &[], 3, 2, 9)).expect("room");
    scheduler.add(request(2, &[], 120, 1, 2)).expect("room");
    let mut out = vec![0; scheduler.buffer_len()];
    let mut seen = Vec::new();
    for _ in 0..5 {
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        seen.push((header.prefill_ids.clone(), header.decode_ids.clone()));
        scheduler.commit(&[]).expect("a commit");
    }
    let both = (vec![2], vec![1]);
    let expected = [
        (vec![1], vec![]),
        both.clone(),
        both.clone(),
        both,
        (vec![], vec![1, 2]),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn requests_are_dropped_after_their_deadline() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_rows: 1,
        ..scheduler_config()
    })
    .expect("a scheduler");
    for (id, deadline) in [(1, 50), (2, 40), (3, i64::MAX)] {
        scheduler
            .add(Request {
                deadline,
                ..request(id, &[], 3, 1, 9)
            })
            .expect("room");
    }
    let mut out = vec![0; scheduler.buffer_len()];
    for (now, expired, prefilled) in [(0, vec![], vec![1]), (39, vec![], vec![]), (60, vec![2, 1], vec![3])] {
        let header = scheduler.plan_step(now, &mut out).expect("a step");
        assert_eq!((header.expired, header.prefill_ids), (expired, prefilled));
        scheduler.commit(&[]).expect("a commit");
    }
}

#[test]
fn prefixes_need_room_in_the_views_in_which_they_lie() {
    let buffer_len = |layers: &[Vec<bool>], prefixes: &[i64]| {
        let mut scheduler = Scheduler::new(scheduler_config()).expect("a scheduler");
        for (number, layers) in (0..).zip(layers) {
            scheduler
                .register_prefix(number, 20, 20, true, Place::Front, layers)
                .expect("a new number");
        }
        scheduler.add(request(1, prefixes, 3, 1, 9)).expect("room");
        scheduler.buffer_len()
    };
    let [none, all] = [buffer_len(&[], &[]), buffer_len(&[vec![], vec![]], &[0, 1])];
    for (layers, views, shared) in [
        ([vec![true, false], vec![false, true]], 2, 1),
        ([vec![true, false, false], vec![false, true, false]], 3, 1),
        ([vec![true, true, false], vec![false, true, true]], 3, 2),
    ] {
        let expected = views * none + shared * (all - none) + views * 6;
        assert_eq!(buffer_len(&layers, &[0, 1]), expected, "{layers:?}");
    }
    assert_eq!(buffer_len(&[vec![true, false], vec![]], &[0, 1]), 2 * all);
}

#[test]
fn calls_out_of_order_are_refused() {
    let mut scheduler = Scheduler::new(scheduler_config()).expect("a scheduler");
    scheduler
        .register_prefix(9, 20, 20, true, Place::Front, &[])
        .expect("a new number");
    let needed = scheduler.buffer_len();
    assert!(matches!(
        scheduler.register_prefix(9, 20, 20, true, Place::Front, &[true, false]),
        Err(Error::Config(_))
    ));
    assert_eq!(
        scheduler.buffer_len(),
        needed,
        "a refused registration changed the state"
    );
    scheduler
        .register_prefix(7, 20, 20, true, Place::Front, &[true, false])
        .expect("a new number");
    assert_eq!(scheduler.buffer_len(), 2 * needed);
    scheduler.forget_prefix(7).expect("idle");
    assert_eq!(scheduler.buffer_len(), needed);
    assert_eq!(scheduler.forget_prefix(8), Err(Error::UnknownPrefix(8)));
    assert_eq!(scheduler.add(request(1, &[8], 3, 1, 1)), Err(Error::UnknownPrefix(8)));
    scheduler.add(request(1, &[9], 3, 1, 1)).expect("room");
    assert!(matches!(
        scheduler.add(request(1, &[9], 3, 1, 1)),
        Err(Error::Request(_))
    ));
    assert!(matches!(scheduler.forget_prefix(9), Err(Error::State(_))));
    assert!(matches!(scheduler.prefix_ready(9), Err(Error::State(_))));
    assert!(matches!(scheduler.commit(&[1]), Err(Error::Request(_))));

    let mut out = vec![0; scheduler.buffer_len()];
    assert!(matches!(
        scheduler.plan_step(0, &mut out[1..]),
        Err(Error::Capacity { .. })
    ));
    assert_eq!((scheduler.num_waiting(), scheduler.num_running()), (1, 0));
    assert_eq!(scheduler.plan_step(0, &mut out).expect("a step").loads, [(9, 0)]);
    scheduler.prefix_ready(9).expect("it was loading");
    assert_eq!(scheduler.plan_step(0, &mut out).expect("a step").prefill_ids, [1]);
    assert!(matches!(scheduler.plan_step(0, &mut out), Err(Error::State(_))));
    assert!(matches!(scheduler.commit(&[1, 1]), Err(Error::Request(_))));
    scheduler.commit(&[]).expect("a commit");
    assert_eq!(scheduler.plan_step(0, &mut out).expect("a step").decode_ids, [1]);
    scheduler.commit(&[]).expect("a commit");
    assert!(matches!(scheduler.plan_step(0, &mut out), Err(Error::State(text)) if text.contains("its 1 steps")));
    scheduler.commit(&[1]).expect("a commit");
    scheduler.forget_prefix(9).expect("idle");
    assert_eq!(scheduler.free_rows(), 320);
}

#[test]
fn own_prefixes_are_moved_if_the_arena_is_fragmented() {
    let mut scheduler = Scheduler::new(scheduler_config()).expect("a scheduler");
    for (prefix, units) in [(0, 4), (1, 8), (2, 11)] {
        scheduler
            .register_prefix(prefix, 16 * units, 0, true, Place::Front, &[])
            .expect("a new number");
    }
    let mut steps = Vec::new();
    for prefixes in [&[0][..], &[1], &[1, 2]] {
        scheduler.add(request(7, prefixes, 3, 1, 2)).expect("room");
        let mut out = vec![0; scheduler.buffer_len()];
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        for (prefix, _) in &header.loads {
            scheduler.prefix_ready(*prefix).expect("it was loading");
        }
        steps.push((header.evictions, header.loads));
        assert_eq!(scheduler.plan_step(0, &mut out).expect("a step").prefill_ids, [7]);
        scheduler.commit(&[7]).expect("a commit");
    }
    let expected = [
        (vec![], vec![(0, 0)]),
        (vec![], vec![(1, 64)]),
        (vec![0, 1], vec![(1, 0), (2, 128)]),
    ];
    assert_eq!(steps, expected);
}

#[test]
fn requests_that_never_fit_are_refused() {
    let mut scheduler = Scheduler::new(scheduler_config()).expect("a scheduler");
    scheduler
        .register_prefix(0, 300, 300, true, Place::Front, &[])
        .expect("a new number");
    for (wrong, limit, needed, available) in [
        (request(1, &[0], 17, 1, 16), Limit::ArenaRows, 352, 320),
        (request(1, &[], 320, 1, 1), Limit::ArenaRows, 336, 320),
        (request(1, &[], 1, 8, 1), Limit::DecodeRows, 8, 7),
        (request(1, &[], 1, 2, usize::MAX), Limit::ArenaRows, usize::MAX, 320),
    ] {
        let error = Error::Capacity {
            limit,
            needed,
            available,
        };
        assert_eq!(scheduler.add(wrong), Err(error));
    }
    for wrong in [
        request(1, &[], 0, 1, 1),
        request(1, &[], 1, 0, 1),
        request(1, &[], 1, 1, 0),
    ] {
        assert!(
            matches!(scheduler.add(wrong.clone()), Err(Error::Request(_))),
            "{wrong:?}"
        );
    }
    scheduler.add(request(1, &[0], 15, 1, 1)).expect("exactly full");
    let short = SchedulerConfig {
        arena_rows: 79,
        ..scheduler_config()
    };
    assert!(matches!(Scheduler::new(short), Err(Error::Config(_))));
}

proptest! {
    #![proptest_config(proptest_config())]

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

/// Scheduler with `rows` decoding requests over `num_prefixes` prefixes.
fn decoding(decode: DecodeSizes, rows: usize, num_prefixes: i64) -> Scheduler {
    let config = SchedulerConfig {
        arena_rows: 1 << 20,
        max_rows: rows,
        max_batched_tokens: 1 << 20,
        decode,
        ..scheduler_config()
    };
    let mut scheduler = Scheduler::new(config).expect("a scheduler");
    for prefix in 0..num_prefixes {
        scheduler
            .register_prefix(prefix, 128, 128, true, Place::Front, &[])
            .expect("a new number");
    }
    for id in 0..i64::try_from(rows).expect("small") {
        let prompt_len = 40 + usize::try_from(id % 7).expect("small") * 30;
        scheduler
            .add(request(id, &[id % num_prefixes], prompt_len, 1, 200))
            .expect("room");
    }
    let mut out = vec![0; scheduler.buffer_len()];
    for _ in 0..2 {
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        for (prefix, _) in &header.loads {
            scheduler.prefix_ready(*prefix).expect("it was loading");
        }
        scheduler.commit(&[]).expect("a commit");
    }
    scheduler
}

/// Costs of a model with 8 billion parameters on an H100.
const SIZES_8B: DecodeSizes = DecodeSizes {
    users: 16,
    fill: 33,
    key_bytes: 512,
    part_bytes: 4160,
    item_bytes: 20_833,
    launch_bytes: 1_718_750,
    padded: true,
};

#[test]
fn padded_tables_keep_their_layout_within_a_bucket_of_rows() {
    let mut scheduler = decoding(SIZES_8B, 64, 5);
    scheduler
        .register_prefix(99, 8, 8, true, Place::Front, &[true, false, false])
        .expect("a new number");
    let mut layouts = Vec::new();
    for ended in 0..40 {
        let mut out = vec![0; scheduler.buffer_len()];
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        let tables = header.decode.expect("rows");
        let start = tables.views[0][0].offset;
        layouts.push((
            64 - ended,
            tables
                .views
                .iter()
                .flatten()
                .map(|s| (s.name, s.offset - start, s.rows, s.cols))
                .collect::<Vec<_>>(),
        ));
        scheduler.commit(&[ended]).expect("a commit");
    }
    let bucket = |rows: i64| rows.cast_unsigned().next_power_of_two();
    for pair in layouts.windows(2) {
        let same_bucket = bucket(pair[0].0) == bucket(pair[1].0);
        assert_eq!(
            pair[0].1 == pair[1].1,
            same_bucket,
            "{} and {} rows",
            pair[0].0,
            pair[1].0
        );
    }
}

#[test]
fn pinned_prefixes_are_evicted_last() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        prefix_rows: 64,
        ..scheduler_config()
    })
    .expect("a scheduler");
    for prefix in 0..6 {
        scheduler
            .register_prefix(prefix, 16, 16, true, Place::Front, &[])
            .expect("a new number");
    }
    let load = |scheduler: &mut Scheduler, prefix| {
        let load = scheduler.load_prefix(prefix).expect("registered").expect("room");
        scheduler.prefix_ready(prefix).expect("it was loading");
        load.evictions
    };
    for prefix in 0..4 {
        assert!(load(&mut scheduler, prefix).is_empty());
    }
    scheduler.set_pinned(0, true).expect("registered");
    assert_eq!(
        load(&mut scheduler, 4),
        [1],
        "the least recently used prefix that is not pinned"
    );
    assert_eq!(load(&mut scheduler, 1), [2]);
    scheduler.set_pinned(0, false).expect("registered");
    assert_eq!(load(&mut scheduler, 2), [0]);
    for prefix in [1, 2, 3, 4] {
        scheduler.set_pinned(prefix, true).expect("registered");
    }
    assert_eq!(load(&mut scheduler, 0).len(), 1, "only pinned prefixes are left");
    assert_eq!(scheduler.load_prefix(0).expect("registered"), None);
    assert!(scheduler.evict_prefix(0).expect("registered").is_some());
    assert_eq!(scheduler.evict_prefix(0).expect("registered"), None);
    assert!(matches!(scheduler.load_prefix(9), Err(Error::UnknownPrefix(9))));
}
