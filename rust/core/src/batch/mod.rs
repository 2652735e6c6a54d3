//! Who goes into which forward, and the int32 tables that tell the kernels about it.

mod buckets;
pub mod decode;
mod number;
pub mod pack;
pub mod plan;
pub mod schedule;
pub mod slots;
pub mod tables;
mod uses;
