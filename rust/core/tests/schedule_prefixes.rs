//! Prefixes in the arena and in the tables of a step.
#![expect(clippy::expect_used, reason = "a test may fail")]

mod small_arena;

use prefixfast_core::Error;
use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{Scheduler, SchedulerConfig};
use small_arena::{request, scheduler_config};

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
