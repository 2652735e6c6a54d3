//! Queue of waiting requests, fair to tenants.
//!
//! The scheme is the virtual token counter of Sheng et al. (2024). Each tenant has a counter of the service that it
//! received, and the tenant with the lowest counter goes next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

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

/// Order of service within a priority: service that the tenant received, and arrival of its first request.
type ServiceKey = (u64, u64);

/// Waiting requests of one priority and account.
#[derive(Debug)]
struct Waiting {
    /// Request ids by arrival.
    ids: BTreeMap<u64, i64>,
    /// Key under which the account is in [`PriorityLevel::order`].
    key: ServiceKey,
}

/// Waiting requests of one priority.
#[derive(Debug, Default)]
struct PriorityLevel {
    by_account: FxHashMap<usize, Waiting>,
    /// Accounts in the order of service by their keys at some earlier time. Keys only grow, so the first account is the
    /// next one if its key is up to date.
    order: BTreeSet<(ServiceKey, usize)>,
}

impl PriorityLevel {
    fn insert(&mut self, account: usize, served: u64, arrival: u64, id: i64) {
        let order = &mut self.order;
        let waiting = self.by_account.entry(account).or_insert_with(|| {
            let key = (served, arrival);
            order.insert((key, account));
            Waiting {
                ids: BTreeMap::new(),
                key,
            }
        });
        waiting.ids.insert(arrival, id);
    }

    /// Removes a request. Returns false if there is none.
    fn remove(&mut self, account: usize, arrival: u64) -> bool {
        let Some(waiting) = self.by_account.get_mut(&account) else {
            return false;
        };
        let is_removed = waiting.ids.remove(&arrival).is_some();
        if waiting.ids.is_empty() {
            self.order.remove(&(waiting.key, account));
            self.by_account.remove(&account);
        }
        is_removed
    }

    /// Updates keys at the front of the order until the first one is up to date. Returns the number of visits.
    ///
    /// Each charge makes at most one key of a level outdated, so all calls together make no more visits than there were
    /// charges and calls.
    fn update_front(&mut self, accounts: &[Account]) -> usize {
        let mut visited = 0;
        while let Some(&(old, account)) = self.order.first() {
            visited += 1;
            let Some(waiting) = self.by_account.get_mut(&account) else {
                break;
            };
            let arrival = waiting.ids.first_key_value().map_or(0, |(arrival, _)| *arrival);
            waiting.key = (accounts[account].served, arrival);
            if waiting.key == old {
                break;
            }
            self.order.pop_first();
            self.order.insert((waiting.key, account));
        }
        visited
    }
}

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
    /// Service and index of the accounts without requests.
    idle: BTreeSet<(u64, usize)>,
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
            .insert(account, self.accounts[account].served, arrival, id);
        self.len += 1;
        position
    }

    /// Id and position of the request that goes next.
    pub(super) fn head(&mut self) -> Option<(i64, QueuePosition)> {
        let mut entry = self.levels.first_entry()?;
        let Reverse(priority) = *entry.key();
        let level = entry.get_mut();
        level.update_front(&self.accounts);
        let &(_, account) = level.order.first()?;
        let (&arrival, &id) = level.by_account.get(&account)?.ids.first_key_value()?;
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
        self.len -= usize::from(level.remove(position.account, position.arrival));
        if level.by_account.is_empty() {
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
    ///
    /// If too many accounts are idle, the one with the least service is removed. Its tenant starts at the floor again.
    pub(super) fn close(&mut self, account: usize) {
        if let Some(found) = self.accounts.get_mut(account) {
            found.num_requests -= 1;
            if found.num_requests == 0 {
                self.idle.insert((found.served, account));
            }
        }
        if self.idle.len() > MAX_IDLE_ACCOUNTS
            && let Some((_, index)) = self.idle.pop_first()
        {
            self.account_of_tenant.remove(&self.accounts[index].tenant);
            self.free.push(index);
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
            index
        });
        let account = &mut self.accounts[index];
        if account.num_requests == 0 {
            self.idle.remove(&(account.served, index));
            account.served = account.served.max(self.floor);
        }
        account.num_requests += 1;
        index
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

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
    fn a_step_visits_no_more_tenants_than_it_serves() {
        const TENANTS: i64 = 10_000;
        const ROWS: usize = 64;
        let mut queue = Queue::default();
        for id in 0..2 * TENANTS {
            queue.push(id, id % TENANTS, 0, id.unsigned_abs());
        }
        let mut running = std::collections::VecDeque::new();
        let (mut visited, mut served) = (0, 0);
        for _ in 0..1000 {
            for account in &running {
                queue.charge(*account, 2);
                served += 1;
            }
            for _ in 0..4 {
                let level = queue.levels.first_entry().unwrap_or_else(|| unreachable!()).into_mut();
                visited += level.update_front(&queue.accounts);
                let (_, position) = queue.head().unwrap_or_else(|| unreachable!());
                queue.admit(position);
                queue.charge(position.account, 40);
                served += 1;
                running.push_back(position.account);
            }
            if running.len() > ROWS {
                running.drain(..4).for_each(|account| queue.close(account));
            }
        }
        assert!(
            queue.len() > 10_000 && visited <= 2 * served,
            "{visited} visits of {served}"
        );
    }

    #[test]
    fn the_order_is_that_of_a_search_over_all_tenants() {
        let mut queue = Queue::default();
        let mut state = 1_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        let mut waiting: Vec<(i64, super::QueuePosition)> = Vec::new();
        for arrival in 0..4000 {
            let id = i64::try_from(arrival).unwrap_or(0);
            let priority = i64::try_from(random(3)).unwrap_or(0);
            let position = queue.push(id, i64::try_from(random(40)).unwrap_or(0), priority, arrival);
            waiting.push((id, position));
            queue.charge(waiting[0].1.account, random(9));
            if random(5) == 0 {
                let (id, position) = waiting.swap_remove(usize::try_from(random(waiting.len() as u64)).unwrap_or(0));
                queue.remove(position);
                queue.close(position.account);
                assert!(id >= 0);
            }
            if random(2) == 0 || arrival > 3000 {
                let served = |position: &super::QueuePosition| queue.accounts[position.account].served;
                let key = |(_, p): &&(i64, super::QueuePosition)| (Reverse(p.priority), served(p), p.arrival);
                let expected = waiting.iter().min_by_key(key).copied();
                assert_eq!(queue.head(), expected);
                if let Some((id, position)) = expected {
                    queue.admit(position);
                    queue.charge(position.account, random(50));
                    queue.close(position.account);
                    waiting.retain(|(other, _)| *other != id);
                }
            }
        }
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
