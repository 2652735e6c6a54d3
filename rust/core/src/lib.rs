//! The part of prefixfast that needs neither Python nor tensors.
//!
//! * [`attend`]: attention of decode steps on CPUs.
//! * [`tokenize`], [`detokenize`]: text to ids and back, over the `tokenizers` crate, on this crate's own threads ([`thread_pool`]).
//! * [`linearize`]: tables to text.
//! * [`batch`]: micro-batches, the tables of a packed forward, and the scheduler of a generation engine.
//!
//! Nothing here panics on any input: every failure is an [`Error`]. Only [`attend`] has unsafe code.

#![deny(unsafe_code)]

#[expect(
    unsafe_code,
    reason = "vector instructions, torch's OpenMP team, outputs that threads share"
)]
pub mod attend;
pub mod batch;
pub mod detokenize;
pub mod error;
pub mod linearize;
pub mod thread_pool;
pub mod tokenize;

pub use error::{Error, Result};
