//! Who enters and who leaves.

use super::super::free_list::Run;
use super::queue::PROMPT_COST;
use super::request::{Entry, Held, Phase, Request};
use super::step::StepHeader;
use super::{MAX_ROWS, Scheduler, TAIL, UNIT};
use crate::error::{Error, Result};

impl Scheduler {
    /// Refuses what an empty arena cannot hold.
    pub(super) fn check_room(&self, request: &Request, prefix_units: usize) -> Result<()> {
        let wrong = |text: String| Err(Error::Request(format!("request {} can never run: {text}", request.id)));
        let (beams, max_rows) = (request.beams, self.limits.max_rows);
        if beams > max_rows {
            return wrong(format!(
                "it needs {beams} decode rows and there are {max_rows}; use fewer beams or raise max_rows"
            ));
        }
        let slots = request.slots().and_then(|slots| slots.checked_next_multiple_of(UNIT));
        let needed = slots.and_then(|slots| slots.checked_add(prefix_units * UNIT));
        let rows = (self.limits.arena_rows - TAIL) / UNIT * UNIT;
        if needed.is_none_or(|needed| needed > rows) {
            let needed = needed.map_or_else(|| "more".to_owned(), |needed| needed.to_string());
            return wrong(format!(
                "{} prompt tokens, {beams} beams x {} new tokens and {} prefix rows, each rounded up to {UNIT}, need {needed} arena rows and there \
                 are {rows}; shorten it or raise arena_rows",
                request.prompt_len,
                request.max_new,
                prefix_units * UNIT
            ));
        }
        let budget = self.limits.prefix_rows / UNIT;
        if prefix_units > budget {
            return wrong(format!(
                "its prefixes, each rounded up to {UNIT}, need {} arena rows and prefixes may hold {}; raise prefix_memory",
                prefix_units * UNIT,
                budget * UNIT
            ));
        }
        let reach = self.residency.rows_of(&request.prefixes) + request.prompt_len + request.max_new;
        let mut most = self.most.clone();
        most.see(request);
        if reach > MAX_ROWS || most.buffer_len(&self.limits) > MAX_ROWS {
            return wrong("its tables outgrow int32; use fewer prefixes or a smaller max_batched_tokens".to_owned());
        }
        Ok(())
    }

    /// Drops the cancelled requests, and those whose deadline has passed.
    pub(super) fn drop_ended(&mut self, now: i64, header: &mut StepHeader) {
        for id in std::mem::take(&mut self.cancelled) {
            self.release(id);
            header.cancelled.push(id);
        }
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.release(id);
            header.expired.push(id);
        }
    }

    /// Admits from the head of the queue while it fits.
    pub(super) fn admit(&mut self, header: &mut StepHeader) {
        while let Some((id, place)) = self.queue.head() {
            let Some(held) = self.place(id, header) else {
                break;
            };
            self.queue.admit(place);
            self.admitted.insert(held.admission, id);
            if let Some(entry) = self.requests.get_mut(&id) {
                let prompt = u64::try_from(entry.request.prompt_len).unwrap_or(u64::MAX);
                self.queue.charge(place.account, prompt.saturating_mul(PROMPT_COST));
                entry.phase = Phase::Admitted(held);
            }
        }
    }

    fn place(&mut self, id: i64, header: &mut StepHeader) -> Option<Held> {
        let alone = self.num_running() == 0;
        let request = &self.requests.get(&id)?.request;
        let units = request.slots()?.div_ceil(UNIT);
        let rows = self.rows.take_low(request.beams)?;
        let prefixes = &request.prefixes;
        let budget = self.limits.prefix_rows / UNIT;
        let arena = &mut self.arena;
        let found = self.residency.place(prefixes, units, false, (arena, budget));
        let found = match found {
            None if alone => self.residency.place(prefixes, units, true, (arena, budget)),
            found => found,
        };
        let Some(placement) = found else {
            self.rows.give(rows);
            return None;
        };
        self.residency.pin(prefixes);
        let (blocks, pos_start) = self.residency.blocks(prefixes);
        header
            .loads
            .extend(placement.loads.iter().map(|(prefix, run)| (*prefix, run.start * UNIT)));
        header.evictions.extend(placement.evictions);
        self.admissions += 1;
        Some(Held {
            admission: self.admissions,
            rows,
            slots: placement.slots,
            blocks,
            pos_start,
            filled: 0,
            steps: 0,
        })
    }

    /// Forgets a request and frees what it holds.
    pub(super) fn release(&mut self, id: i64) {
        self.cancelled.remove(&id);
        let Some(Entry { request, place, phase }) = self.requests.remove(&id) else {
            return;
        };
        self.deadlines.remove(&(request.deadline, id));
        self.queue.close(place.account);
        match phase {
            Phase::Waiting => self.queue.remove(place),
            Phase::Admitted(held) => {
                self.admitted.remove(&held.admission);
                self.decoding.remove(&(request.prefixes.clone(), place.arrival));
                self.rows.give(held.rows);
                held.slots.into_iter().for_each(|run: Run| self.arena.give(run));
                self.residency.unpin(&request.prefixes);
            }
        }
        self.residency.unhold(&request.prefixes);
    }
}
