//! Configuration of a scheduler with a small arena, and requests.

use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::schedule::{Request, SchedulerConfig};

pub(crate) fn scheduler_config() -> SchedulerConfig {
    SchedulerConfig {
        arena_rows: 64 + 16 * 20 + 5,
        max_rows: 7,
        max_batched_tokens: 50,
        tile_rows: 4,
        buckets: 3,
        prefix_rows: usize::MAX,
        decode: DecodeSizes::default(),
    }
}

pub(crate) fn request(id: i64, prefixes: &[i64], prompt_len: usize, beams: usize, max_new: usize) -> Request {
    Request {
        id,
        prefixes: prefixes.into(),
        encoder_len: 0,
        prompt_len,
        beams,
        max_new,
        tenant: 0,
        priority: 0,
        deadline: i64::MAX,
    }
}
