//! Model of the allocations of a scheduler, reconstructed from its tables alone.

mod tables;
mod work;

use std::collections::{BTreeMap, BTreeSet};

use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{Request, Scheduler, SchedulerConfig, StepHeader};
use tables::table;

#[derive(Debug)]
struct RunningRequest {
    request: Request,
    rows: Vec<i32>,
    slots: Vec<usize>,
    prefilled: usize,
    steps: usize,
}

pub(crate) struct Model {
    scheduler: Scheduler,
    config: SchedulerConfig,
    /// Number of rows of each prefix.
    rows: Vec<usize>,
    /// Whether each prefix lies in each layer, empty for all layers.
    layers: Vec<Vec<bool>>,
    waiting: BTreeMap<i64, Request>,
    running: BTreeMap<i64, RunningRequest>,
    loading: Vec<i64>,
    /// First arena row of each prefix that is ready or being loaded.
    resident: BTreeMap<i64, usize>,
    cancelled: BTreeSet<i64>,
    now: i64,
}

fn at(value: i32) -> usize {
    usize::try_from(value).expect("an index")
}

fn index(prefix: i64) -> usize {
    usize::try_from(prefix).expect("an index")
}

impl Model {
    pub(crate) fn new(config: SchedulerConfig, rows: &[usize], layers: Vec<Vec<bool>>) -> Self {
        let mut scheduler = Scheduler::new(config).expect("a scheduler");
        for ((prefix, rows), layers) in (0..).zip(rows).zip(&layers) {
            scheduler
                .register_prefix(prefix, *rows, *rows, true, Place::Front, layers)
                .expect("a new number");
        }
        Self {
            scheduler,
            config,
            rows: rows.to_vec(),
            layers,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            loading: Vec::new(),
            resident: BTreeMap::new(),
            cancelled: BTreeSet::new(),
            now: 0,
        }
    }

    pub(crate) fn add(&mut self, request: Request) {
        if self.scheduler.add(request.clone()).is_ok() {
            self.waiting.insert(request.id, request);
        }
    }

    pub(crate) fn cancel(&mut self, id: i64) {
        let known = self.waiting.contains_key(&id) || self.running.contains_key(&id);
        assert_eq!(self.scheduler.cancel(id), known && !self.cancelled.contains(&id));
        if known {
            self.cancelled.insert(id);
        }
    }

    /// Completes one of the loads under way.
    pub(crate) fn finish_load(&mut self, pick: usize) {
        if !self.loading.is_empty() {
            let prefix = self.loading.swap_remove(pick % self.loading.len());
            self.scheduler.prefix_ready(prefix).expect("it was loading");
        }
    }

    /// Pins, unpins, loads or evicts a prefix, depending on `pick`.
    pub(crate) fn pin_load_or_evict(&mut self, prefix: i64, pick: usize) {
        match pick % 4 {
            0 | 1 => self
                .scheduler
                .set_pinned(prefix, pick.is_multiple_of(4))
                .expect("registered"),
            2 => {
                let found = self.scheduler.load_prefix(prefix).expect("registered");
                if let Some(load) = found {
                    self.check_moves(&load.evictions, &[(prefix, load.row)]);
                }
            }
            _ => {
                let row = self.scheduler.evict_prefix(prefix).expect("registered");
                if let Some(row) = row {
                    assert_eq!(self.resident[&prefix], row);
                    self.check_moves(&[prefix], &[]);
                }
            }
        }
        let (start, _) = self.scheduler.prefix_state(prefix).expect("registered");
        assert_eq!(start, self.resident.get(&prefix).copied());
    }

    /// Plans and commits one step. Requests end after `pick` decode steps or at their limit.
    pub(crate) fn step(&mut self, pick: usize) {
        let mut out = vec![-7; self.scheduler.buffer_len()];
        self.now += 1;
        let header = self.scheduler.plan_step(self.now, &mut out).expect("a step");
        assert_eq!(header.cancelled, self.cancelled.iter().copied().collect::<Vec<_>>());
        for id in std::mem::take(&mut self.cancelled) {
            self.waiting.remove(&id);
            self.running.remove(&id);
        }
        self.check_expired(&header.expired);
        self.check_prefix_moves(&header);
        let full = |running: &RunningRequest| running.prefilled == running.request.prompt_len;
        let decoded: BTreeSet<i64> = self
            .running
            .iter()
            .filter(|(_, running)| full(running))
            .map(|(id, _)| *id)
            .collect();
        assert_eq!(decoded, header.decode_ids.iter().copied().collect());
        if let Some(tables) = &header.decode {
            self.check_decode(&header.decode_ids, &out, tables);
        }
        if let Some(tables) = &header.prefill {
            self.check_prefill(&header.prefill_ids, &out, tables);
        }
        self.check_token_budget(&header, &out);
        self.check_overlaps();
        let over = |id: &&i64| self.running[*id].steps >= self.running[*id].request.max_new.min(pick);
        let finished: Vec<i64> = header.decode_ids.iter().filter(over).copied().collect();
        self.scheduler.commit(&finished).expect("a commit");
        for id in finished {
            self.running.remove(&id);
            self.cancelled.remove(&id);
        }
    }

    /// Steps until every request has ended, then checks that nothing leaked.
    pub(crate) fn drain(&mut self) {
        let most = 200 * (self.waiting.len() + self.running.len()) + 10;
        for _ in 0..most {
            (0..self.loading.len()).for_each(|_| self.finish_load(0));
            self.step(usize::MAX);
        }
        assert_eq!(
            (self.scheduler.num_waiting(), self.scheduler.num_running()),
            (0, 0),
            "a request did not end"
        );
        for prefix in 0..self.rows.len() {
            self.scheduler
                .forget_prefix(i64::try_from(prefix).expect("small"))
                .expect("idle");
        }
        assert_eq!(self.scheduler.free_rows(), (self.config.arena_rows - 64) / 16 * 16);
    }

    fn check_expired(&mut self, expired: &[i64]) {
        let late = |request: &Request| request.deadline <= self.now;
        let mut expected: Vec<(i64, i64)> = self
            .waiting
            .values()
            .chain(self.running.values().map(|running| &running.request))
            .filter(|request| late(request))
            .map(|request| (request.deadline, request.id))
            .collect();
        expected.sort_unstable();
        let ids: Vec<i64> = expected.iter().map(|(_, id)| *id).collect();
        assert_eq!(expired, ids);
        for id in ids {
            self.waiting.remove(&id);
            self.running.remove(&id);
        }
    }

    fn check_prefix_moves(&mut self, header: &StepHeader) {
        self.check_moves(&header.evictions, &header.loads);
    }

    fn check_moves(&mut self, evictions: &[i64], loads: &[(i64, usize)]) {
        for prefix in evictions {
            assert!(
                self.resident.remove(prefix).is_some() && !self.loading.contains(prefix),
                "prefix {prefix} was evicted while absent or loading"
            );
            assert!(
                self.running
                    .values()
                    .all(|running| !running.request.prefixes.contains(prefix)),
                "prefix {prefix} was evicted under a running request"
            );
        }
        for (prefix, row) in loads {
            assert!(row % 16 == 0 && self.resident.insert(*prefix, *row).is_none());
            self.loading.push(*prefix);
        }
        let held = |prefix: &i64| self.rows[index(*prefix)].next_multiple_of(16);
        let held: usize = self.resident.keys().map(held).sum();
        assert!(held <= self.config.prefix_rows, "prefixes occupy {held} rows");
    }
}
