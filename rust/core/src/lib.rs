//! Core of prefixfast, independent of Python and of tensor libraries.
//!
//! * [`attend`]: attention on CPUs.
//! * [`best_tokens`]: the most likely tokens of rows of logits on CPUs.
//! * [`write_rows`]: copies of new keys and values to an arena.
//! * [`tokenize`], [`detokenize`]: tokenization with the `tokenizers` crate, in parallel on the threads of
//!   [`thread_pool`].
//! * [`layers`]: `LayerNorm` and GELU on CPUs.
//! * [`digest`]: digests of weights.
//! * [`linearize`]: conversion of data tables to text.
//! * [`batch`]: micro-batches for training, the scheduler for generation, and the tables that the attention kernels
//!   read.
//!
//! No input causes a panic. Every failure is an [`Error`]. Only [`attend`], [`best_tokens`], [`layers`] and
//! [`write_rows`] contain unsafe code.

#![deny(unsafe_code)]

#[expect(
    unsafe_code,
    reason = "vector intrinsics, torch's OpenMP runtime, and outputs that several threads write to"
)]
pub mod attend;
pub mod batch;
#[expect(unsafe_code, reason = "functions that are compiled for vector instructions")]
pub mod best_tokens;
pub mod detokenize;
pub mod digest;
pub mod error;
#[expect(
    unsafe_code,
    reason = "functions that are compiled for vector instructions, and outputs"
)]
pub mod layers;
pub mod linearize;
pub mod thread_pool;
pub mod tokenize;
#[expect(unsafe_code, reason = "rows of memory that several threads write to")]
pub mod write_rows;

pub use error::{Error, Limit, Result};
