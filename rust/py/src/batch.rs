//! Bindings of batch composition: `pack`, `plan_packed` and `Scheduler`.

pub(crate) mod pack;
pub(crate) mod plan;
pub(crate) mod schedule;
