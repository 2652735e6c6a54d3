//! The crate's own threads, never rayon's global pool: that one belongs to whoever else is in the process, and does not survive a fork.

use std::ffi::OsStr;
use std::sync::OnceLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// Names the number of threads; by default one a core.
pub const NUM_THREADS: &str = "PREFIXFAST_NUM_THREADS";
const MAX_THREADS: usize = 1024;

/// Pools are never dropped: one inherited through a fork has no threads left, and joining them would hang. They form a chain of write-once
/// cells, so looking one up takes no lock that a fork could catch in another thread's hands.
struct Node {
    pid: u32,
    pool: ThreadPool,
    next: OnceLock<&'static Node>,
}

static FIRST: OnceLock<&'static Node> = OnceLock::new();

/// The pool of this process, built on first use and again after a fork.
///
/// # Errors
/// [`Error::Config`] if the environment variable [`NUM_THREADS`] is no number from 1 to 1024, or the system refuses the threads.
pub fn pool() -> Result<&'static ThreadPool> {
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
                // A thread that lost the race goes on with the winner's pool; its own idle pool stays, once in a process's life.
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
                "the system refused {threads} threads ({error}); set {NUM_THREADS} to fewer"
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
            "environment variable {NUM_THREADS} is {text:?}: expected a whole number from 1 to {MAX_THREADS}; correct or unset it"
        ))),
    }
}

#[cfg(test)]
#[expect(clippy::expect_used, reason = "a test may fail")]
mod tests {
    use super::{num_threads, pool};

    #[test]
    fn reads_the_number_of_threads() {
        assert_eq!(num_threads(Some(" 3 ")), Ok(3));
        assert!(num_threads(None).is_ok_and(|number| number >= 1));
        for wrong in ["", "0", "-1", "two", "1e3", "1025", "99999999999999999999"] {
            assert!(num_threads(Some(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn is_one_pool() {
        assert!(std::ptr::eq(pool().expect("a pool"), pool().expect("the same")));
    }
}
