//! Planning time of one decode step with 1,024 requests over 256 prefixes: without work tables, with them, with padded
//! tables, and with a tenth of the requests replaced in each step.
#![expect(clippy::expect_used, reason = "a benchmark may fail")]
#![expect(missing_docs, reason = "criterion's macros make undocumented items")]

use criterion::{Criterion, criterion_group, criterion_main};
use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{Request, Scheduler, SchedulerConfig};

const REQUESTS: i64 = 1024;
const PREFIXES: i64 = 256;
/// Costs of a model with 32 query heads, 8 kv heads and head dim 128 in bf16, on 132 multiprocessors.
const WORK: DecodeSizes = DecodeSizes {
    users: 16,
    fill: 33,
    key_bytes: 512,
    part_bytes: 4160,
    item_bytes: 20_833,
    launch_bytes: 1_718_750,
    padded: false,
};

fn request(id: i64) -> Request {
    Request {
        id,
        prefixes: [id % PREFIXES].into(),
        encoder_len: 0,
        prompt_len: 40,
        beams: 1,
        max_new: 1 << 20,
        tenant: id % PREFIXES,
        priority: 0,
        deadline: i64::MAX,
    }
}

/// Scheduler with all requests in their decode phase.
fn running(buffer: &mut Vec<i32>, decode: DecodeSizes) -> Scheduler {
    let config = SchedulerConfig {
        arena_rows: 1 << 30,
        max_rows: 1024,
        max_batched_tokens: 1 << 16,
        tile_rows: 128,
        buckets: 4,
        prefix_rows: usize::MAX,
        decode,
    };
    let mut scheduler = Scheduler::new(config).expect("a scheduler");
    for prefix in 0..PREFIXES {
        scheduler
            .register_prefix(prefix, 200, 200, true, Place::Front, &[])
            .expect("a new number");
    }
    for id in 0..REQUESTS {
        scheduler
            .add(Request {
                max_new: 1 << 19,
                ..request(id)
            })
            .expect("room");
    }
    buffer.resize(scheduler.buffer_len(), 0);
    while step(&mut scheduler, buffer).1 < 1024 {}
    scheduler
}

/// Plans and commits one step. Returns the numbers of prefilled and decoded requests.
fn step(scheduler: &mut Scheduler, buffer: &mut [i32]) -> (usize, usize) {
    let header = scheduler.plan_step(0, buffer).expect("a step");
    for (prefix, _) in &header.loads {
        scheduler.prefix_ready(*prefix).expect("it was loading");
    }
    scheduler.commit(&[]).expect("a commit");
    (header.prefill_ids.len(), header.decode_ids.len())
}

fn steps(c: &mut Criterion) {
    let mut buffer = Vec::new();
    let padded = DecodeSizes { padded: true, ..WORK };
    for (name, decode) in [("work", WORK), ("padded work", padded)] {
        let mut scheduler = running(&mut buffer, decode);
        c.bench_function(
            &format!("plan a decode step with {name}, 1024 requests, 256 prefixes"),
            |b| b.iter(|| step(&mut scheduler, &mut buffer)),
        );
    }
    let mut scheduler = running(&mut buffer, DecodeSizes::default());
    c.bench_function("plan a decode step, 1024 requests, 256 prefixes", |b| {
        b.iter(|| step(&mut scheduler, &mut buffer));
    });
    let mut next = REQUESTS;
    let mut oldest = 0;
    c.bench_function("the same, 102 requests replaced each step", |b| {
        b.iter(|| {
            for _ in 0..102 {
                scheduler.cancel(oldest);
                oldest += 1;
                let new = Request {
                    max_new: 1 << 19,
                    ..request(next)
                };
                scheduler.add(new).expect("room");
                next += 1;
            }
            step(&mut scheduler, &mut buffer)
        });
    });
}

criterion_group!(benches, steps);
criterion_main!(benches);
