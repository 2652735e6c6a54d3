//! Thread pool of the crate.
//!
//! Rayon's global pool is not used, because other code of the process may configure it, and because it does not survive
//! a fork.

use std::ffi::OsStr;
use std::sync::OnceLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// Environment variable with the number of threads, by default one per core.
pub const NUM_THREADS: &str = "PREFIXFAST_NUM_THREADS";
const MAX_THREADS: usize = 1024;

/// Pool of one process in a linked list of write-once cells.
///
/// Looking up a pool takes no lock, because a fork could happen while another thread holds the lock. Pools are never
/// dropped, because a pool that was inherited through a fork has no threads left and joining them would hang.
struct Node {
    pid: u32,
    pool: ThreadPool,
    next: OnceLock<&'static Node>,
}

static FIRST: OnceLock<&'static Node> = OnceLock::new();

/// Thread pool of this process, built at the first use and again after a fork.
///
/// # Errors
/// [`Error::Config`] if the environment variable [`NUM_THREADS`] is not an integer from 1 to 1024, or if the system
/// cannot start the threads.
pub fn thread_pool() -> Result<&'static ThreadPool> {
    let pid = std::process::id();
    let mut cell = &FIRST;
    loop {
        match cell.get() {
            Some(node) if node.pid == pid => return Ok(&node.pool),
            Some(node) => cell = &node.next,
            None => {
                let node = Box::leak(Box::new(Node {
                    pid,
                    pool: build()?,
                    next: OnceLock::new(),
                }));
                // A thread that loses the race continues with the winner's pool. Its own pool stays idle, at most once
                // per process.
                let _ = cell.set(node);
            }
        }
    }
}

fn build() -> Result<ThreadPool> {
    let value = std::env::var_os(NUM_THREADS);
    let threads = num_threads(value.as_deref().map(OsStr::to_string_lossy).as_deref())?;
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("prefixfast-{index}"))
        .build()
        .map_err(|error| {
            Error::Config(format!(
                "the system cannot start {threads} threads ({error}); set {NUM_THREADS} to a smaller number"
            ))
        })
}

fn num_threads(value: Option<&str>) -> Result<usize> {
    let Some(text) = value else {
        return Ok(std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(MAX_THREADS));
    };
    match text.trim().parse::<usize>() {
        Ok(number) if (1..=MAX_THREADS).contains(&number) => Ok(number),
        _ => Err(Error::Config(format!(
            "environment variable {NUM_THREADS} is {text:?}: expected an integer from 1 to {MAX_THREADS}; correct or \
             unset it"
        ))),
    }
}

#[cfg(test)]
#[expect(clippy::expect_used, reason = "a test may fail")]
mod tests {
    use super::{num_threads, thread_pool};

    #[test]
    fn the_number_of_threads_is_parsed() {
        assert_eq!(num_threads(Some(" 3 ")), Ok(3));
        assert!(num_threads(None).is_ok_and(|number| number >= 1));
        for wrong in ["", "0", "-1", "two", "1e3", "1025", "99999999999999999999"] {
            assert!(num_threads(Some(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_process_has_one_pool() {
        assert!(std::ptr::eq(
            thread_pool().expect("a pool"),
            thread_pool().expect("the same")
        ));
    }
}
