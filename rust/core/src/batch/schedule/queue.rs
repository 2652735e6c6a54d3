//! Queue of waiting requests, fair to tenants.
//!
//! The scheme is the virtual token counter of Sheng et al. (2024). Each tenant has a counter of the service that it
//! received, and the tenant with the lowest counter goes next.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

/// Number of idle accounts to keep, so that the service of a tenant who pauses is not forgotten.
const MAX_IDLE_ACCOUNTS: usize = 1024;
/// Service units of a prompt token.
pub(super) const PROMPT_COST: u64 = 1;
/// Service units of a generated token of one decode row.
pub(super) const TOKEN_COST: u64 = 2;

/// Account of one tenant.
#[derive(Debug, Default)]
struct Account {
    tenant: i64,
    /// Service units received.
    served: u64,
    /// Number of queued and running requests.
    num_requests: usize,
}

/// Position of a waiting request in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueuePosition {
    pub(super) priority: i64,
    /// Index of the tenant's account.
    pub(super) account: usize,
    /// Sequence number of the request's arrival.
    pub(super) arrival: u64,
}

/// Request ids of one priority, by account and arrival.
type PriorityLevel = BTreeMap<usize, BTreeMap<u64, i64>>;

/// Waiting requests, ordered by priority, then by the service that their tenant received, then by arrival.
#[derive(Debug, Default)]
pub(super) struct Queue {
    levels: BTreeMap<Reverse<i64>, PriorityLevel>,
    len: usize,
    accounts: Vec<Account>,
    /// Index of the account of each tenant.
    account_of_tenant: FxHashMap<i64, usize>,
    /// Indices of unused accounts.
    free: Vec<usize>,
    /// Number of accounts without requests.
    num_idle: usize,
    /// Service of the tenant that was chosen last. A tenant who arrives starts here, without credit for the time
    /// before.
    floor: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds a request. Its position is the argument of [`Queue::remove`].
    pub(super) fn push(&mut self, id: i64, tenant: i64, priority: i64, arrival: u64) -> QueuePosition {
        let account = self.open(tenant);
        let position = QueuePosition {
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
        position
    }

    /// Id and position of the request that goes next.
    pub(super) fn head(&self) -> Option<(i64, QueuePosition)> {
        let (&Reverse(priority), level) = self.levels.first_key_value()?;
        let first = level.iter().filter_map(|(&account, ids)| {
            let (&arrival, &id) = ids.first_key_value()?;
            Some((self.accounts.get(account)?.served, arrival, account, id))
        });
        let (_, arrival, account, id) = first.min()?;
        let position = QueuePosition {
            priority,
            account,
            arrival,
        };
        Some((id, position))
    }

    /// Removes the head of the queue when it is admitted.
    pub(super) fn admit(&mut self, position: QueuePosition) {
        self.remove(position);
        if let Some(account) = self.accounts.get(position.account) {
            self.floor = self.floor.max(account.served);
        }
    }

    /// Removes a request from the queue.
    pub(super) fn remove(&mut self, position: QueuePosition) {
        let Some(level) = self.levels.get_mut(&Reverse(position.priority)) else {
            return;
        };
        if let Some(ids) = level.get_mut(&position.account) {
            self.len -= usize::from(ids.remove(&position.arrival).is_some());
            if ids.is_empty() {
                level.remove(&position.account);
            }
        }
        if level.is_empty() {
            self.levels.remove(&Reverse(position.priority));
        }
    }

    /// Charges service units to an account.
    pub(super) fn charge(&mut self, account: usize, cost: u64) {
        if let Some(account) = self.accounts.get_mut(account) {
            account.served = account.served.saturating_add(cost);
        }
    }

    /// Counts the end of a queued or running request of an account.
    pub(super) fn close(&mut self, account: usize) {
        if let Some(account) = self.accounts.get_mut(account) {
            account.num_requests -= 1;
            self.num_idle += usize::from(account.num_requests == 0);
        }
        if self.num_idle > MAX_IDLE_ACCOUNTS {
            self.forget_idle();
        }
    }

    /// Index of the tenant's account, which is opened if necessary, with one more request counted.
    fn open(&mut self, tenant: i64) -> usize {
        let index = self.account_of_tenant.get(&tenant).copied().unwrap_or_else(|| {
            let index = self.free.pop().unwrap_or(self.accounts.len());
            if index == self.accounts.len() {
                self.accounts.push(Account::default());
            }
            self.accounts[index] = Account {
                tenant,
                ..Account::default()
            };
            self.account_of_tenant.insert(tenant, index);
            self.num_idle += 1;
            index
        });
        let account = &mut self.accounts[index];
        if account.num_requests == 0 {
            account.served = account.served.max(self.floor);
            self.num_idle -= 1;
        }
        account.num_requests += 1;
        index
    }

    /// Forgets the idle accounts that would restart at the floor anyway, and all idle accounts if those are too few.
    fn forget_idle(&mut self) {
        for floor in [self.floor, u64::MAX] {
            if self.num_idle <= MAX_IDLE_ACCOUNTS / 2 {
                return;
            }
            for (index, account) in self.accounts.iter().enumerate() {
                if account.num_requests == 0
                    && account.served <= floor
                    && self.account_of_tenant.get(&account.tenant) == Some(&index)
                {
                    self.account_of_tenant.remove(&account.tenant);
                    self.free.push(index);
                    self.num_idle -= 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_IDLE_ACCOUNTS, Queue};

    fn order(queue: &mut Queue, cost: u64) -> Vec<i64> {
        let mut order = Vec::new();
        while let Some((id, position)) = queue.head() {
            queue.admit(position);
            queue.charge(position.account, cost);
            order.push(id);
        }
        order
    }

    #[test]
    fn the_least_served_tenant_goes_first() {
        let mut queue = Queue::default();
        for (id, tenant) in [(1, 7), (2, 7), (3, 7), (4, 8), (5, 8)] {
            queue.push(id, tenant, 0, id.unsigned_abs());
        }
        queue.push(6, 7, 1, 6);
        assert_eq!(order(&mut queue, 5), [6, 4, 1, 5, 2, 3]);
    }

    #[test]
    fn absence_gives_no_credit() {
        let mut queue = Queue::default();
        for id in 1..=10 {
            queue.push(id, 7, 0, id.unsigned_abs());
        }
        for _ in 0..6 {
            let (_, position) = queue.head().unwrap_or_else(|| unreachable!());
            queue.admit(position);
            queue.charge(position.account, 5);
        }
        for id in 11..=13 {
            queue.push(id, 8, 0, id.unsigned_abs());
        }
        assert_eq!(order(&mut queue, 5), [11, 7, 12, 8, 13, 9, 10]);
    }

    #[test]
    fn idle_accounts_are_forgotten() {
        let mut queue = Queue::default();
        for id in 0..50_000_i64 {
            let position = queue.push(id, id, 0, id.unsigned_abs());
            queue.admit(position);
            queue.charge(position.account, 1);
            queue.close(position.account);
        }
        assert!(queue.accounts.len() <= 2 * MAX_IDLE_ACCOUNTS && queue.len() == 0);
    }
}
