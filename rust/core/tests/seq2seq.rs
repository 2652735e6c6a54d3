//! The scheduler of an encoder-decoder base under random requests, loads, cancellations, deadlines and evictions. The
//! tables of each site are those of a naive implementation, no arena row has two owners, and nothing leaks.
#![expect(clippy::expect_used, reason = "a test may fail")]

#[path = "model/encoder.rs"]
mod encoder;
#[path = "model/work.rs"]
mod work;

use std::collections::BTreeSet;

use encoder::{Model, Random, at, config, request, table, to_i32};
use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{PrefixPart, PrefixShape, Request, Scheduler, SchedulerConfig};
use prefixfast_core::{Error, Limit};

/// Serves random requests for `steps` steps.
fn churn(folds: &[usize], seed: u64, steps: usize) {
    let mut random = Random(seed);
    let decode = DecodeSizes {
        users: random.below(4),
        fill: 1 + random.below(20),
        key_bytes: 512,
        part_bytes: 100,
        item_bytes: 100,
        launch_bytes: 0,
        padded: false,
    };
    let decode = if decode.users == 0 {
        DecodeSizes { users: 3, ..decode }
    } else {
        decode
    };
    let mut model = Model::new(folds, decode, &mut random);
    let (mut id, mut evictions) = (0, 0);
    for _ in 0..steps {
        while random.below(4) > 0 && model.waiting.len() < 20 {
            id += 1;
            let count = random.below(4);
            let prefixes: BTreeSet<i64> = (0..count).map(|_| i64::from(to_i32(random.below(8)))).collect();
            let prefixes: Vec<i64> = prefixes.into_iter().collect();
            let deadline = if random.below(7) == 0 { model.now + 9 } else { i64::MAX };
            let (encoder_len, beams, max_new) = (1 + random.below(185), 1 + random.below(4), 1 + random.below(20));
            let request = Request {
                deadline,
                prompt_len: 1 + random.below(3),
                tenant: i64::from(to_i32(random.below(3))),
                ..request(id, encoder_len, &prefixes, beams, max_new)
            };
            if model.scheduler.add(request.clone()).is_ok() {
                model.waiting.insert(id, request);
            }
        }
        if random.below(5) == 0 {
            model.scheduler.cancel(id - i64::from(to_i32(random.below(12))));
        }
        if random.below(3) > 0 {
            model.finish_loads();
        }
        if random.below(20) == 0 {
            let number = i64::from(to_i32(random.below(8)));
            if model.scheduler.evict_prefix(number).expect("registered").is_some() {
                model.resident.remove(&number);
                evictions += 1;
            }
        }
        model.step(&mut random);
    }
    assert!(evictions > 0 && id > 50 && model.most_runs > 2, "the steps test little");
    model.drain(&mut random);
}

#[test]
fn tables_are_those_of_the_naive_implementation_and_nothing_leaks_in_2000_steps() {
    churn(&[0, 0, 0], 1, 700);
    churn(&[0, 0, 0, 1, 1, 1], 2, 700);
    churn(&[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 3, 600);
}

#[test]
fn own_prefixes_are_moved_if_the_encoder_rows_need_longer_runs() {
    let short = SchedulerConfig {
        arena_rows: 64 + 16 * 21,
        ..config(DecodeSizes::default())
    };
    let mut scheduler = Scheduler::with_encoder(short, vec![0]).expect("a scheduler");
    for (prefix, units) in [(0, 3), (1, 8)] {
        scheduler
            .register_prefix(prefix, 16 * units, 0, true, Place::Front, &[])
            .expect("a new number");
    }
    let mut steps = Vec::new();
    for (prefixes, encoder_len) in [(&[0][..], 1), (&[1], 1), (&[1], 190)] {
        scheduler.add(request(7, encoder_len, prefixes, 1, 2)).expect("room");
        let mut out = vec![0; scheduler.buffer_len()];
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        for (prefix, _) in &header.loads {
            scheduler.prefix_ready(*prefix).expect("it was loading");
        }
        steps.push((header.evictions, header.loads));
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        let cross = header.cross.expect("a prefill");
        steps.push((
            header.prefill_ids,
            vec![(0, at(table(&out, &cross.views[0], "slots")[0]))],
        ));
        scheduler.commit(&[7]).expect("a commit");
    }
    // Without prefix 0 there are runs of 3 and 10 units, of which 8 and 3 hold encoder rows. They take 12.
    let expected = [
        (vec![], vec![(0, 0)]),
        (vec![7], vec![(0, 320)]),
        (vec![], vec![(1, 48)]),
        (vec![7], vec![(0, 320)]),
        (vec![0, 1], vec![(1, 0)]),
        (vec![7], vec![(0, 144)]),
    ];
    assert_eq!(steps, expected);
}

#[test]
fn requests_that_never_fit_are_refused() {
    let mut scheduler = Scheduler::with_encoder(config(DecodeSizes::default()), vec![0]).expect("a scheduler");
    // A step has 200 tokens, of which up to 10 are decode rows, and the request itself has one of them.
    for (wrong, limit, needed, available) in [
        (request(1, 191, &[], 1, 1), Limit::EncoderTokens, 192, 191),
        (request(1, usize::MAX, &[], 1, 1), Limit::EncoderTokens, usize::MAX, 191),
        (request(1, 100, &[], 10, 90), Limit::ArenaRows, 912 + 112, 960),
    ] {
        let error = Error::Capacity {
            limit,
            needed,
            available,
        };
        assert_eq!(scheduler.add(wrong), Err(error));
    }
    scheduler.add(request(1, 190, &[], 1, 1)).expect("exactly full");
    assert!(matches!(
        scheduler.add(request(2, 0, &[], 1, 1)),
        Err(Error::Request(text)) if text.contains("encoder-decoder")
    ));
    let mut decoder_only = Scheduler::new(config(DecodeSizes::default())).expect("a scheduler");
    assert!(matches!(
        decoder_only.add(request(2, 3, &[], 1, 1)),
        Err(Error::Request(text)) if text.contains("decoder-only")
    ));
}

#[test]
fn settings_and_prefixes_that_do_not_fit_are_refused() {
    let plain = config(DecodeSizes::default());
    let padded = DecodeSizes {
        users: 1,
        fill: 1,
        padded: true,
        ..DecodeSizes::default()
    };
    for (config, folds) in [(plain, vec![]), (plain, vec![0, 2]), (config(padded), vec![0])] {
        assert!(matches!(Scheduler::with_encoder(config, folds), Err(Error::Config(_))));
    }
    let shape = PrefixShape {
        rows: 64,
        pos_start: 4,
        slides: true,
        place: Place::Front,
    };
    let part = |offset: usize, rows: usize| PrefixPart {
        offset,
        rows,
        layers: &[],
    };
    let good = [part(0, 20), part(32, 16), part(48, 8)];
    let mut scheduler = Scheduler::with_encoder(plain, vec![0, 1]).expect("a scheduler");
    let needed = scheduler.buffer_len();
    let infix = PrefixShape {
        place: Place::Infix,
        ..shape
    };
    let few = PrefixPart {
        layers: &[true],
        ..part(48, 8)
    };
    for (number, shape, parts) in [
        (-1, shape, good),
        (0, infix, good),
        (0, shape, [part(0, 20), part(16, 16), part(48, 8)]),
        (0, shape, [part(0, 20), part(33, 15), part(48, 8)]),
        (0, shape, [part(0, 20), part(32, 16), part(48, 9)]),
        (0, shape, [part(0, 20), part(32, 16), few]),
        (0, shape, [part(0, usize::MAX), part(32, 16), part(48, 8)]),
    ] {
        let found = scheduler.register_parts(number, shape, parts);
        assert!(matches!(found, Err(Error::Config(_))), "{number} {shape:?} {parts:?}");
    }
    assert_eq!(
        scheduler.buffer_len(),
        needed,
        "a refused registration changed the state"
    );
    scheduler.register_parts(0, shape, good).expect("they fit");
    let mut decoder_only = Scheduler::new(plain).expect("a scheduler");
    assert!(matches!(
        decoder_only.register_parts(0, shape, good),
        Err(Error::Config(text)) if text.contains("decoder-only")
    ));
}
