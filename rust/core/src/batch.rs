//! Batch composition: micro-batches for training, the scheduler for generation, and the int32 tables that tell the
//! attention kernels which query sees which keys.

mod block_tables;
pub mod decode;
pub mod free_list;
mod int32;
mod length_buckets;
mod loss_weights;
mod max_tree;
pub mod pack;
pub mod place;
pub mod plan;
pub mod schedule;
pub mod table_buffer;
