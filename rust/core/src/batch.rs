//! Who goes into which forward, and the int32 tables that tell the kernels about it.

mod block_tables;
pub mod decode;
pub mod free_list;
mod int32;
mod length_buckets;
pub mod pack;
pub mod plan;
pub mod schedule;
pub mod table_buffer;
