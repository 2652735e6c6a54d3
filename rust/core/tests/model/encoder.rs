//! Naive implementation of the scheduler of an encoder-decoder base, reconstructed from its tables alone.

use std::collections::BTreeMap;

use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{
    PrefixPart, PrefixShape, Request, Scheduler, SchedulerConfig, StepHeader, StepTables,
};
use prefixfast_core::batch::table_buffer::Section;

use super::work;

pub(crate) const ARENA_ROWS: usize = 64 + 16 * 60;
pub(crate) const DECODER_LAYERS: usize = 3;

pub(crate) fn at(value: i32) -> usize {
    usize::try_from(value).expect("an index")
}

pub(crate) fn table<'a>(out: &'a [i32], view: &[Section], name: &str) -> &'a [i32] {
    let section = view.iter().find(|section| section.name == name).expect("a section");
    &out[section.offset..section.offset + section.len()]
}

/// Linear congruential generator.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.0 >> 33).expect("31 bits") % end
    }
}

/// Rows of a prefix at the decoder, in cross-attention and at the encoder.
#[derive(Debug, Clone)]
pub(crate) struct Prefix {
    offsets: [usize; 3],
    rows: [usize; 3],
    layers: [Vec<bool>; 3],
    total: usize,
}

impl Prefix {
    pub(crate) fn random(random: &mut Random, folds: &[usize]) -> Self {
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

    pub(crate) fn register(&self, scheduler: &mut Scheduler, number: i64) {
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
pub(crate) struct Running {
    request: Request,
    /// Arena rows of its encoder tokens.
    encoder_rows: Vec<usize>,
    slots: Vec<usize>,
    steps: usize,
}

pub(crate) struct Model {
    pub(crate) scheduler: Scheduler,
    pub(crate) folds: Vec<usize>,
    pub(crate) prefixes: Vec<Prefix>,
    pub(crate) resident: BTreeMap<i64, usize>,
    pub(crate) loading: Vec<i64>,
    pub(crate) waiting: BTreeMap<i64, Request>,
    pub(crate) running: BTreeMap<i64, Running>,
    pub(crate) now: i64,
    /// Largest number of runs of a request's encoder rows.
    pub(crate) most_runs: usize,
}

pub(crate) fn config(decode: DecodeSizes) -> SchedulerConfig {
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

pub(crate) fn request(id: i64, encoder_len: usize, prefixes: &[i64], beams: usize, max_new: usize) -> Request {
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
    pub(crate) fn new(folds: &[usize], decode: DecodeSizes, random: &mut Random) -> Self {
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
            most_runs: 0,
        }
    }

    /// Blocks (first arena row, rows) that a request sees in one layer of a site, and those of its decode steps.
    pub(crate) fn blocks(&self, request: &Request, site: usize, layer: usize) -> Vec<(usize, usize)> {
        let fold = if site == 2 { self.folds[layer] } else { 0 };
        let real = request.prefixes.iter().filter_map(|number| {
            let prefix = &self.prefixes[usize::try_from(*number).expect("an index")];
            let rows = prefix.rows[site];
            let has = rows > 0 && prefix.layers[site].get(layer).is_none_or(|has| *has);
            has.then(|| (self.resident[number] + prefix.offsets[site] + fold * rows, rows))
        });
        real.collect()
    }

    pub(crate) fn step(&mut self, random: &mut Random) {
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

    pub(crate) fn check_prefill(&mut self, header: &StepHeader, out: &[i32]) {
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
            let runs = runs(&rows);
            assert!(runs.len() <= 4 && runs.iter().all(|(first, _)| first.is_multiple_of(16)));
            assert!(runs.iter().rev().skip(1).all(|(_, rows)| rows.is_multiple_of(64)));
            self.most_runs = self.most_runs.max(runs.len());
            self.waiting.remove(&request.id);
            let running = Running {
                encoder_rows: rows,
                slots: prompt_slots.by_ref().take(request.prompt_len).collect(),
                steps: 0,
                request,
            };
            self.running.insert(running.request.id, running);
        }
        assert_eq!((next.next(), prompt_slots.next()), (None, None));
    }

    pub(crate) fn check_decode(&mut self, header: &StepHeader, out: &[i32]) {
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
                    blocks.extend(runs(&running.encoder_rows));
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
    pub(crate) fn check_owners(&self) {
        let mut used = [false; ARENA_ROWS - 64];
        let prefixes = self.resident.iter().flat_map(|(prefix, row)| {
            let rows = self.prefixes[usize::try_from(*prefix).expect("an index")].total;
            *row..*row + rows
        });
        let requests = self
            .running
            .values()
            .flat_map(|running| running.encoder_rows.iter().chain(&running.slots).copied());
        for row in prefixes.chain(requests) {
            assert!(
                !std::mem::replace(&mut used[row], true),
                "arena row {row} has two owners"
            );
        }
    }

    pub(crate) fn finish_loads(&mut self) {
        for prefix in self.loading.drain(..) {
            self.scheduler.prefix_ready(prefix).expect("it was loading");
        }
    }

    pub(crate) fn drain(&mut self, random: &mut Random) {
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

pub(crate) fn to_i32(value: usize) -> i32 {
    i32::try_from(value).expect("small")
}

/// Maximal runs (first, rows) of consecutive rows. Free runs of an arena never touch, so that each run is one of them.
pub(crate) fn runs(rows: &[usize]) -> Vec<(usize, usize)> {
    let chunks = rows.chunk_by(|row, next| *next == row + 1);
    chunks.map(|run| (run[0], run.len())).collect()
}

pub(crate) fn view_of(tables: &StepTables, layer: usize) -> &[Section] {
    &tables.views[tables.view_of.get(layer).copied().unwrap_or(0)]
}

/// Asserts that segment or row `number` uses the blocks `expected` (first row, rows) from left to right.
pub(crate) fn assert_uses(out: &[i32], view: &[Section], number: usize, expected: &[(usize, usize)]) {
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
