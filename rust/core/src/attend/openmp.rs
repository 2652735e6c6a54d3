//! Threads of vectorized code: those of the OpenMP runtime that torch uses.
//!
//! A thread pool of this crate would compete with torch's threads, which keep spinning for a while after each of
//! torch's loops. On two cores a decode step took 30.6 ms with a separate pool and 22.6 ms on torch's threads.

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

type ThreadFunction = unsafe extern "C" fn(*mut c_void);
/// Signature of `GOMP_parallel(function, argument, threads, flags)`, which runs the function once on each thread of a
/// team.
type GompParallel = unsafe extern "C" fn(ThreadFunction, *mut c_void, u32, u32);

static GOMP_PARALLEL: OnceLock<std::result::Result<GompParallel, String>> = OnceLock::new();

/// Selects the OpenMP runtime that a loaded library of this process uses. The first call decides for the process.
///
/// # Errors
/// Reason why no runtime was found. Decode attention then runs on the calling thread alone.
pub fn use_runtime_of(library: &CStr) -> std::result::Result<(), String> {
    GOMP_PARALLEL
        .get_or_init(|| find(library))
        .as_ref()
        .map(|_| ())
        .map_err(Clone::clone)
}

#[cfg(target_os = "linux")]
fn find(library: &CStr) -> std::result::Result<GompParallel, String> {
    use std::ffi::{c_char, c_int};

    // RTLD_LAZY and RTLD_NOLOAD, with their values in glibc and musl.
    const LAZY_AND_ALREADY_LOADED: c_int = 1 | 4;
    unsafe extern "C" {
        fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
        fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    // SAFETY: the declarations are those of POSIX, and both strings end with a zero byte. With RTLD_NOLOAD nothing is
    // loaded, so no initializer of foreign code runs.
    let symbol = unsafe {
        let handle = dlopen(library.as_ptr(), LAZY_AND_ALREADY_LOADED);
        if handle.is_null() {
            return Err(format!("{} is not loaded", library.to_string_lossy()));
        }
        // The search covers the library and all of its dependencies.
        dlsym(handle, c"GOMP_parallel".as_ptr())
    };
    if symbol.is_null() {
        return Err(format!(
            "{} uses no OpenMP runtime with GOMP_parallel",
            library.to_string_lossy()
        ));
    }
    // SAFETY: a symbol of this name is the entry point of GCC's OpenMP runtime, or of a runtime with the same
    // interface. It has had this signature since GCC 4.9. The handle is never closed, so the code stays loaded.
    Ok(unsafe { std::mem::transmute::<*mut c_void, GompParallel>(symbol) })
}

#[cfg(not(target_os = "linux"))]
fn find(_library: &CStr) -> std::result::Result<GompParallel, String> {
    Err("torch's OpenMP runtime is supported on Linux only".to_owned())
}

/// State that the threads of a team share.
struct Team<'a> {
    work: &'a (dyn Fn() + Sync),
    panicked: AtomicBool,
}

/// Runs `work` once on each of up to `threads` threads, including the caller's, and returns when all of them have
/// ended.
///
/// # Errors
/// [`Error::State`] if `work` panicked.
pub(crate) fn run_on_threads(threads: usize, work: &(dyn Fn() + Sync)) -> Result<()> {
    let team = Team {
        work,
        panicked: AtomicBool::new(false),
    };
    let argument = std::ptr::from_ref(&team).cast_mut().cast::<c_void>();
    match GOMP_PARALLEL.get() {
        Some(Ok(gomp_parallel)) if threads > 1 => {
            // SAFETY: `gomp_parallel` is GOMP_parallel (`find`). It calls `thread_main` with `argument` on its threads
            // and returns only after all calls have returned, so `team` outlives them. The threads only read `team`,
            // which is Sync. `thread_main` never unwinds.
            unsafe {
                gomp_parallel(thread_main, argument, u32::try_from(threads).unwrap_or(u32::MAX), 0);
            }
        }
        // SAFETY: `argument` points to `team`, which lives until the call has returned.
        _ => unsafe { thread_main(argument) },
    }
    if team.panicked.into_inner() {
        return Err(Error::State(
            "internal error: attention panicked, see stderr: expected no panic; please report it".to_owned(),
        ));
    }
    Ok(())
}

/// # Safety
/// `argument` points to a [`Team`] that lives until the call returns.
unsafe extern "C" fn thread_main(argument: *mut c_void) {
    // SAFETY: the caller promises that `argument` points to a live `Team`.
    let team = unsafe { &*argument.cast::<Team<'_>>() };
    if catch_unwind(AssertUnwindSafe(|| (team.work)())).is_err() {
        team.panicked.store(true, Ordering::Relaxed);
    }
}
