//! The tables of decoder-only steps and packed forwards are those that were recorded before encoder-decoder bases.
#![expect(clippy::expect_used, reason = "a test may fail")]

use std::collections::BTreeMap;

use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{Request, Scheduler, SchedulerConfig};
use prefixfast_core::batch::table_buffer::Section;

/// Hash of 64-bit words.
struct Hash(u64);

impl Hash {
    fn add(&mut self, value: i64) {
        self.0 = (self.0 ^ value.cast_unsigned())
            .wrapping_mul(0x0100_0000_01b3)
            .rotate_left(29);
    }

    fn add_count(&mut self, count: usize) {
        self.add(i64::try_from(count).expect("a count"));
    }

    fn add_section(&mut self, section: &Section) {
        section.name.bytes().for_each(|byte| self.add(i64::from(byte)));
        for value in [section.offset, section.rows, section.cols] {
            self.add_count(value);
        }
    }
}

/// Linear congruential generator.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    fn count(&mut self, end: u64) -> usize {
        usize::try_from(self.below(end)).expect("small")
    }
}

/// Hash of everything that a scheduler returns over 400 steps with arrivals, cancellations and ends.
fn serve(decode: DecodeSizes, max_batched_tokens: usize) -> u64 {
    let (mut hash, mut random) = (Hash(0xcbf2_9ce4_8422_2325), Random(7));
    let config = SchedulerConfig {
        arena_rows: 64 + 16 * 60,
        max_rows: 12,
        max_batched_tokens,
        tile_rows: 4,
        buckets: 3,
        prefix_rows: 400,
        decode,
    };
    let mut scheduler = Scheduler::new(config).expect("a scheduler");
    for prefix in 0..12 {
        let rows = random.count(60);
        let place = Place::from_number(i64::from(prefix % 5 == 4)).expect("a place");
        let layers: Vec<bool> = (0..6).map(|_| prefix % 3 > 0 || random.below(2) == 0).collect();
        scheduler
            .register_prefix(prefix, rows, rows / 2, prefix % 2 == 0, place, &layers)
            .expect("a new number");
    }
    let (mut id, mut steps_left) = (0, BTreeMap::new());
    for now in 0..400 {
        while random.below(3) > 0 {
            id += 1;
            let count = random.count(3);
            let request = Request {
                id,
                prefixes: (0..count)
                    .map(|_| i64::try_from(random.below(12)).expect("small"))
                    .collect(),
                encoder_len: 0,
                prompt_len: 1 + random.count(90),
                beams: 1 + random.count(3),
                max_new: 1 + random.count(20),
                tenant: i64::try_from(random.below(3)).expect("small"),
                priority: i64::from(random.below(5) == 0),
                deadline: if random.below(9) == 0 { now + 20 } else { i64::MAX },
            };
            steps_left.insert(id, request.max_new);
            hash.add(i64::from(scheduler.add(request).is_ok()));
        }
        if random.below(6) == 0 {
            scheduler.cancel(id - 3);
        }
        hash.add_count(scheduler.buffer_len());
        let mut out = vec![-1; scheduler.buffer_len()];
        let header = scheduler.plan_step(now, &mut out).expect("a step");
        for value in &out {
            hash.add(i64::from(*value));
        }
        for tables in [&header.prefill, &header.decode].into_iter().flatten() {
            tables
                .views
                .iter()
                .flatten()
                .for_each(|section| hash.add_section(section));
            tables.view_of.iter().for_each(|view| hash.add_count(*view));
            hash.add(i64::from(tables.reach));
        }
        let ids = [
            &header.evictions,
            &header.prefill_ids,
            &header.decode_ids,
            &header.cancelled,
            &header.expired,
        ];
        for id in ids.into_iter().flatten() {
            hash.add(*id);
        }
        for (prefix, row) in &header.loads {
            hash.add(*prefix);
            hash.add_count(*row);
            scheduler.prefix_ready(*prefix).expect("it was loading");
        }
        let mut finished = header.decode_ids;
        finished.retain(|id| {
            let left = steps_left.entry(*id).or_insert(usize::MAX);
            *left -= 1;
            *left == 0 || random.below(8) == 0
        });
        scheduler.commit(&finished).expect("a commit");
    }
    hash.0
}

#[test]
fn steps_are_those_that_were_recorded() {
    let decode = DecodeSizes {
        users: 4,
        fill: 9,
        key_bytes: 512,
        part_bytes: 100,
        item_bytes: 100,
        launch_bytes: 0,
        padded: false,
    };
    let padded = DecodeSizes { padded: true, ..decode };
    let found = [serve(DecodeSizes::default(), 100), serve(decode, 60), serve(padded, 40)];
    assert_eq!(
        found,
        [
            18_439_030_311_613_310_572,
            12_807_141_800_629_670_988,
            17_123_326_808_847_372_398
        ]
    );
}
