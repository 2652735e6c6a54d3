//! Waiting requests, and who of their tenants comes next.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

/// Accounts without requests that are kept, so that a tenant who pauses does not start afresh.
const KEPT: usize = 1024;
/// What a prompt token and a generated token of one row cost a tenant.
pub(super) const PROMPT_COST: u64 = 1;
/// See [`PROMPT_COST`].
pub(super) const TOKEN_COST: u64 = 2;

/// One tenant's account.
#[derive(Debug, Default)]
struct Account {
    tenant: i64,
    /// Service received, in token costs (Sheng et al. 2024, virtual token counter).
    served: u64,
    /// Requests queued or running.
    requests: usize,
}

/// Where a waiting request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) priority: i64,
    pub(super) account: usize,
    pub(super) arrival: u64,
}

type Level = BTreeMap<usize, BTreeMap<u64, i64>>;

/// The queue: the highest priority first, within it the tenant served least, within that first come first served.
#[derive(Debug, Default)]
pub(super) struct Queue {
    levels: BTreeMap<Reverse<i64>, Level>,
    len: usize,
    accounts: Vec<Account>,
    numbers: FxHashMap<i64, usize>,
    free: Vec<usize>,
    idle: usize,
    /// Service of the tenant that was chosen last: one who arrives gets no credit for the time before.
    floor: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// A request of a tenant arrives; the place is for [`Queue::remove`].
    pub(super) fn push(&mut self, id: i64, tenant: i64, priority: i64, arrival: u64) -> Place {
        let account = self.open(tenant);
        let place = Place {
            priority,
            account,
            arrival,
        };
        self.levels
            .entry(Reverse(priority))
            .or_default()
            .entry(account)
            .or_default()
            .insert(arrival, id);
        self.len += 1;
        place
    }

    /// The request that comes next.
    pub(super) fn head(&self) -> Option<(i64, Place)> {
        let (&Reverse(priority), level) = self.levels.first_key_value()?;
        let first = level.iter().filter_map(|(&account, ids)| {
            let (&arrival, &id) = ids.first_key_value()?;
            Some((self.accounts.get(account)?.served, arrival, account, id))
        });
        let (_, arrival, account, id) = first.min()?;
        let place = Place {
            priority,
            account,
            arrival,
        };
        Some((id, place))
    }

    /// The head is admitted.
    pub(super) fn admit(&mut self, place: Place) {
        self.remove(place);
        if let Some(account) = self.accounts.get(place.account) {
            self.floor = self.floor.max(account.served);
        }
    }

    /// A request leaves the queue.
    pub(super) fn remove(&mut self, place: Place) {
        let Some(level) = self.levels.get_mut(&Reverse(place.priority)) else {
            return;
        };
        if let Some(ids) = level.get_mut(&place.account) {
            self.len -= usize::from(ids.remove(&place.arrival).is_some());
            if ids.is_empty() {
                level.remove(&place.account);
            }
        }
        if level.is_empty() {
            self.levels.remove(&Reverse(place.priority));
        }
    }

    /// A tenant received service.
    pub(super) fn charge(&mut self, account: usize, cost: u64) {
        if let Some(account) = self.accounts.get_mut(account) {
            account.served = account.served.saturating_add(cost);
        }
    }

    /// A request of a tenant, queued or running, has ended.
    pub(super) fn close(&mut self, account: usize) {
        if let Some(account) = self.accounts.get_mut(account) {
            account.requests -= 1;
            self.idle += usize::from(account.requests == 0);
        }
        if self.idle > KEPT {
            self.drop_idle();
        }
    }

    fn open(&mut self, tenant: i64) -> usize {
        let number = self.numbers.get(&tenant).copied().unwrap_or_else(|| {
            let number = self.free.pop().unwrap_or(self.accounts.len());
            if number == self.accounts.len() {
                self.accounts.push(Account::default());
            }
            self.accounts[number] = Account {
                tenant,
                ..Account::default()
            };
            self.numbers.insert(tenant, number);
            self.idle += 1;
            number
        });
        let account = &mut self.accounts[number];
        if account.requests == 0 {
            account.served = account.served.max(self.floor);
            self.idle -= 1;
        }
        account.requests += 1;
        number
    }

    /// Forgets the accounts without requests that would start at the floor anyway, else all without requests.
    fn drop_idle(&mut self) {
        for floor in [self.floor, u64::MAX] {
            if self.idle <= KEPT / 2 {
                return;
            }
            for (number, account) in self.accounts.iter().enumerate() {
                if account.requests == 0
                    && account.served <= floor
                    && self.numbers.get(&account.tenant) == Some(&number)
                {
                    self.numbers.remove(&account.tenant);
                    self.free.push(number);
                    self.idle -= 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{KEPT, Queue};

    fn order(queue: &mut Queue, cost: u64) -> Vec<i64> {
        let mut order = Vec::new();
        while let Some((id, place)) = queue.head() {
            queue.admit(place);
            queue.charge(place.account, cost);
            order.push(id);
        }
        order
    }

    #[test]
    fn serves_the_least_served_first() {
        let mut queue = Queue::default();
        for (id, tenant) in [(1, 7), (2, 7), (3, 7), (4, 8), (5, 8)] {
            queue.push(id, tenant, 0, id.unsigned_abs());
        }
        queue.push(6, 7, 1, 6);
        assert_eq!(order(&mut queue, 5), [6, 4, 1, 5, 2, 3]);
    }

    #[test]
    fn gives_no_credit_for_time_away() {
        let mut queue = Queue::default();
        for id in 1..=10 {
            queue.push(id, 7, 0, id.unsigned_abs());
        }
        for _ in 0..6 {
            let (_, place) = queue.head().unwrap_or_else(|| unreachable!());
            queue.admit(place);
            queue.charge(place.account, 5);
        }
        for id in 11..=13 {
            queue.push(id, 8, 0, id.unsigned_abs());
        }
        assert_eq!(order(&mut queue, 5), [11, 7, 12, 8, 13, 9, 10]);
    }

    #[test]
    fn forgets_tenants_that_left() {
        let mut queue = Queue::default();
        for id in 0..50_000_i64 {
            let place = queue.push(id, id, 0, id.unsigned_abs());
            queue.admit(place);
            queue.charge(place.account, 1);
            queue.close(place.account);
        }
        assert!(queue.accounts.len() <= 2 * KEPT && queue.len() == 0);
    }
}
