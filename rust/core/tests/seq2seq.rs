//! The scheduler of an encoder-decoder base under random requests, loads, cancellations, deadlines and evictions. The
//! tables of each site are those of a naive implementation, no arena row has two owners, and nothing leaks.
#![expect(clippy::expect_used, reason = "a test may fail")]

#[path = "model/work.rs"]
mod work;

use std::collections::{BTreeMap, BTreeSet};

use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{
    PrefixPart, PrefixShape, Request, Scheduler, SchedulerConfig, StepHeader, StepTables,
};
use prefixfast_core::batch::table_buffer::Section;
use prefixfast_core::{Error, Limit};

const ARENA_ROWS: usize = 64 + 16 * 60;
const DECODER_LAYERS: usize = 3;

fn at(value: i32) -> usize {
    usize::try_from(value).expect("an index")
}

fn table<'a>(out: &'a [i32], view: &[Section], name: &str) -> &'a [i32] {
    let section = view.iter().find(|section| section.name == name).expect("a section");
    &out[section.offset..section.offset + section.len()]
}

/// Linear congruential generator.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.0 >> 33).expect("31 bits") % end
    }
}

/// Rows of a prefix at the decoder, in cross-attention and at the encoder.
#[derive(Debug, Clone)]
struct Prefix {
    offsets: [usize; 3],
    rows: [usize; 3],
    layers: [Vec<bool>; 3],
    total: usize,
}

impl Prefix {
    fn random(random: &mut Random, folds: &[usize]) -> Self {
        let rows = [40, 24, 20].map(|end| random.below(end));
        let mut layers = [DECODER_LAYERS, DECODER_LAYERS, folds.len()]
            .map(|count| (0..count).map(|_| random.below(3) > 0).collect::<Vec<bool>>());
        if random.below(2) == 0 {
            layers = [vec![], vec![], vec![]];
        }
        let cross = rows[0].next_multiple_of(16);
        let encoder = cross + rows[1].next_multiple_of(16);
        let copies = folds.iter().max().expect("a layer") + 1;
        Self {
            offsets: [0, cross, encoder],
            rows,
            layers,
            total: encoder + copies * rows[2],
        }
    }

    fn register(&self, scheduler: &mut Scheduler, number: i64) {
        let shape = PrefixShape {
            rows: self.total,
            pos_start: self.rows[0],
            slides: true,
            place: Place::Front,
        };
        let part = |site: usize| PrefixPart {
            offset: self.offsets[site],
            rows: self.rows[site],
            layers: &self.layers[site],
        };
        let parts = [part(0), part(1), part(2)];
        scheduler.register_parts(number, shape, parts).expect("a new number");
    }
}

#[derive(Debug)]
struct Running {
    request: Request,
    encoder_row: usize,
    slots: Vec<usize>,
    steps: usize,
}

struct Model {
    scheduler: Scheduler,
    folds: Vec<usize>,
    prefixes: Vec<Prefix>,
    resident: BTreeMap<i64, usize>,
    loading: Vec<i64>,
    waiting: BTreeMap<i64, Request>,
    running: BTreeMap<i64, Running>,
    now: i64,
}

fn config(decode: DecodeSizes) -> SchedulerConfig {
    SchedulerConfig {
        arena_rows: ARENA_ROWS,
        max_rows: 10,
        max_batched_tokens: 200,
        tile_rows: 4,
        buckets: 3,
        prefix_rows: 600,
        decode,
    }
}

fn request(id: i64, encoder_len: usize, prefixes: &[i64], beams: usize, max_new: usize) -> Request {
    Request {
        id,
        prefixes: prefixes.into(),
        encoder_len,
        prompt_len: 1,
        beams,
        max_new,
        tenant: 0,
        priority: 0,
        deadline: i64::MAX,
    }
}

impl Model {
    fn new(folds: &[usize], decode: DecodeSizes, random: &mut Random) -> Self {
        let mut scheduler = Scheduler::with_encoder(config(decode), folds.to_vec()).expect("a scheduler");
        let prefixes: Vec<Prefix> = (0..8).map(|_| Prefix::random(random, folds)).collect();
        for (prefix, number) in prefixes.iter().zip(0..) {
            prefix.register(&mut scheduler, number);
        }
        Self {
            scheduler,
            folds: folds.to_vec(),
            prefixes,
            resident: BTreeMap::new(),
            loading: Vec::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            now: 0,
        }
    }

    /// Blocks (first arena row, rows) that a request sees in one layer of a site, and those of its decode steps.
    fn blocks(&self, request: &Request, site: usize, layer: usize) -> Vec<(usize, usize)> {
        let fold = if site == 2 { self.folds[layer] } else { 0 };
        let real = request.prefixes.iter().filter_map(|number| {
            let prefix = &self.prefixes[usize::try_from(*number).expect("an index")];
            let rows = prefix.rows[site];
            let has = rows > 0 && prefix.layers[site].get(layer).is_none_or(|has| *has);
            has.then(|| (self.resident[number] + prefix.offsets[site] + fold * rows, rows))
        });
        real.collect()
    }

    fn step(&mut self, random: &mut Random) {
        let mut out = vec![-7; self.scheduler.buffer_len()];
        self.now += 1;
        let header = self.scheduler.plan_step(self.now, &mut out).expect("a step");
        for id in header.cancelled.iter().chain(&header.expired) {
            self.waiting.remove(id);
            self.running.remove(id);
        }
        for prefix in &header.evictions {
            assert!(self.resident.remove(prefix).is_some() && !self.loading.contains(prefix));
        }
        for (prefix, row) in &header.loads {
            assert!(row.is_multiple_of(16) && self.resident.insert(*prefix, *row).is_none());
            self.loading.push(*prefix);
        }
        self.check_prefill(&header, &out);
        self.check_decode(&header, &out);
        self.check_owners();
        let mut finished = header.decode_ids;
        finished.retain(|id| {
            let running = &self.running[id];
            running.steps == running.request.max_new || random.below(9) == 0
        });
        self.scheduler.commit(&finished).expect("a commit");
        for id in finished {
            self.running.remove(&id);
        }
    }

    fn check_prefill(&mut self, header: &StepHeader, out: &[i32]) {
        let (Some(prefill), Some(encoder), Some(cross)) = (&header.prefill, &header.encoder, &header.cross) else {
            assert!(header.prefill_ids.is_empty() && header.encoder.is_none() && header.cross.is_none());
            return;
        };
        let requests: Vec<Request> = header.prefill_ids.iter().map(|id| self.waiting[id].clone()).collect();
        let tokens: usize = requests
            .iter()
            .map(|request| request.encoder_len + request.prompt_len)
            .sum();
        let decoded: usize = header.decode_ids.iter().map(|id| self.running[id].request.beams).sum();
        assert!(tokens + decoded <= 200, "{tokens} tokens and {decoded} rows");
        let (mut first, mut key) = (0, 0);
        let (mut encoder_segments, mut cross_segments, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for request in &requests {
            let (len, keys) = (to_i32(request.prompt_len), to_i32(request.encoder_len));
            encoder_segments.push([key, keys, key, keys]);
            cross_segments.push([first, len, key, keys]);
            positions.extend(0..keys);
            first += len;
            key += keys;
        }
        for view in &encoder.views {
            assert_eq!(table(out, view, "seg").as_chunks::<4>().0, encoder_segments);
            assert_eq!(table(out, view, "position_ids"), positions);
            assert!(table(out, view, "gather").is_empty());
        }
        for view in &cross.views {
            assert_eq!(table(out, view, "seg").as_chunks::<4>().0, cross_segments);
            assert!(table(out, view, "gather").is_empty());
        }
        for (number, request) in requests.iter().enumerate() {
            assert!(request.prefixes.iter().all(|prefix| !self.loading.contains(prefix)));
            for (site, tables, layers) in [
                (0, prefill, DECODER_LAYERS),
                (1, cross, DECODER_LAYERS),
                (2, encoder, self.folds.len()),
            ] {
                for layer in 0..layers {
                    assert_uses(out, view_of(tables, layer), number, &self.blocks(request, site, layer));
                }
            }
        }
        let slots = table(out, &cross.views[0], "slots");
        let mut next = slots.iter().map(|slot| at(*slot));
        let mut prompt_slots = table(out, &prefill.views[0], "slots").iter().map(|slot| at(*slot));
        for request in requests {
            let rows: Vec<usize> = next.by_ref().take(request.encoder_len).collect();
            assert!(rows[0].is_multiple_of(16) && rows.windows(2).all(|pair| pair[1] == pair[0] + 1));
            self.waiting.remove(&request.id);
            let running = Running {
                encoder_row: rows[0],
                slots: prompt_slots.by_ref().take(request.prompt_len).collect(),
                steps: 0,
                request,
            };
            self.running.insert(running.request.id, running);
        }
        assert_eq!((next.next(), prompt_slots.next()), (None, None));
    }

    fn check_decode(&mut self, header: &StepHeader, out: &[i32]) {
        let (Some(decode), Some(cross)) = (&header.decode, &header.decode_cross) else {
            assert!(header.decode_ids.is_empty() && header.decode_cross.is_none());
            return;
        };
        let beams = |id: &i64| self.running[id].request.beams;
        let count: usize = header.decode_ids.iter().map(beams).sum();
        for view in &cross.views {
            assert_eq!(table(out, view, "row"), table(out, &decode.views[0], "row"));
            assert_eq!(table(out, view, "lens"), vec![0; count]);
            work::check_work(out, view);
        }
        let slot = table(out, &decode.views[0], "slot");
        let mut row = 0;
        for id in &header.decode_ids {
            let running = &self.running[id];
            let request = running.request.clone();
            for beam in row..row + request.beams {
                for layer in 0..DECODER_LAYERS {
                    assert_uses(out, view_of(decode, layer), beam, &self.blocks(&request, 0, layer));
                    let mut blocks = self.blocks(&request, 1, layer);
                    blocks.push((running.encoder_row, request.encoder_len));
                    assert_uses(out, view_of(cross, layer), beam, &blocks);
                }
            }
            let running = self.running.get_mut(id).expect("a running request");
            running.steps += 1;
            running
                .slots
                .extend(slot[row..row + request.beams].iter().map(|slot| at(*slot)));
            row += request.beams;
        }
        assert_eq!(row, slot.len());
    }

    /// No arena row has two owners.
    fn check_owners(&self) {
        let mut used = [false; ARENA_ROWS - 64];
        let prefixes = self.resident.iter().flat_map(|(prefix, row)| {
            let rows = self.prefixes[usize::try_from(*prefix).expect("an index")].total;
            *row..*row + rows
        });
        let requests = self.running.values().flat_map(|running| {
            let encoder = running.encoder_row..running.encoder_row + running.request.encoder_len;
            encoder.chain(running.slots.iter().copied())
        });
        for row in prefixes.chain(requests) {
            assert!(
                !std::mem::replace(&mut used[row], true),
                "arena row {row} has two owners"
            );
        }
    }

    fn finish_loads(&mut self) {
        for prefix in self.loading.drain(..) {
            self.scheduler.prefix_ready(prefix).expect("it was loading");
        }
    }

    fn drain(&mut self, random: &mut Random) {
        for _ in 0..200 * (self.waiting.len() + self.running.len()) {
            self.finish_loads();
            self.step(random);
        }
        let left = (self.scheduler.num_waiting(), self.scheduler.num_running());
        assert_eq!(left, (0, 0), "a request did not end");
        for number in (0..).take(self.prefixes.len()) {
            self.scheduler.forget_prefix(number).expect("idle");
        }
        assert_eq!(self.scheduler.free_rows(), ARENA_ROWS - 64, "arena rows leaked");
    }
}

fn to_i32(value: usize) -> i32 {
    i32::try_from(value).expect("small")
}

fn view_of(tables: &StepTables, layer: usize) -> &[Section] {
    &tables.views[tables.view_of.get(layer).copied().unwrap_or(0)]
}

/// Asserts that segment or row `number` uses the blocks `expected` (first row, rows) from left to right.
fn assert_uses(out: &[i32], view: &[Section], number: usize, expected: &[(usize, usize)]) {
    let indptr = table(out, view, "use_indptr");
    let uses = table(out, view, "use").as_chunks::<3>().0;
    let blocks = table(out, view, "block").as_chunks::<2>().0;
    let mut position = -expected.iter().map(|(_, rows)| to_i32(*rows)).sum::<i32>();
    let mut wanted = Vec::new();
    for (first, rows) in expected {
        wanted.push((*first, *rows, position));
        position += to_i32(*rows);
    }
    let mine = &uses[at(indptr[number])..at(indptr[number + 1])];
    let found: Vec<(usize, usize, i32)> = mine
        .iter()
        .map(|[block, position, _]| {
            let [first, rows] = blocks[at(*block)];
            (at(first), at(rows), *position)
        })
        .collect();
    assert_eq!(found, wanted);
}

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
            let (encoder_len, beams, max_new) = (1 + random.below(120), 1 + random.below(4), 1 + random.below(20));
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
    assert!(evictions > 0 && id > 50, "the steps test little");
    model.drain(&mut random);
}

#[test]
fn tables_are_those_of_the_naive_implementation_and_nothing_leaks_in_2000_steps() {
    churn(&[0, 0, 0], 1, 700);
    churn(&[0, 0, 0, 1, 1, 1], 2, 700);
    churn(&[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 3, 600);
}

#[test]
fn own_prefixes_are_moved_if_the_encoder_rows_need_one_run() {
    let short = SchedulerConfig {
        arena_rows: 64 + 16 * 20,
        ..config(DecodeSizes::default())
    };
    let mut scheduler = Scheduler::with_encoder(short, vec![0]).expect("a scheduler");
    for (prefix, units) in [(0, 4), (1, 8)] {
        scheduler
            .register_prefix(prefix, 16 * units, 0, true, Place::Front, &[])
            .expect("a new number");
    }
    let mut steps = Vec::new();
    for (prefixes, encoder_len) in [(&[0][..], 1), (&[1], 1), (&[1], 150)] {
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
    let expected = [
        (vec![], vec![(0, 0)]),
        (vec![7], vec![(0, 304)]),
        (vec![], vec![(1, 64)]),
        (vec![7], vec![(0, 304)]),
        (vec![0, 1], vec![(1, 0)]),
        (vec![7], vec![(0, 160)]),
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
