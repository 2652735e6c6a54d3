//! The threads that a call runs on: those that torch's own OpenMP runtime has already. A pool of our own would fight with theirs, which spin for a
//! while after each of torch's loops (30.6 against 22.6 ms a step on two cores).

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

type Work = unsafe extern "C" fn(*mut c_void);
/// `GOMP_parallel(function, its argument, threads, flags)`: runs the function once on each thread of a team.
type Parallel = unsafe extern "C" fn(Work, *mut c_void, u32, u32);

static PARALLEL: OnceLock<std::result::Result<Parallel, String>> = OnceLock::new();

/// Finds the OpenMP runtime that a library of this process uses; what the first call found stays.
///
/// # Errors
/// Why there is none; calls then run on one thread.
pub fn join(library: &CStr) -> std::result::Result<(), String> {
    PARALLEL
        .get_or_init(|| find(library))
        .as_ref()
        .map(|_| ())
        .map_err(Clone::clone)
}

#[cfg(target_os = "linux")]
fn find(library: &CStr) -> std::result::Result<Parallel, String> {
    use std::ffi::{c_char, c_int};

    const LAZY_AND_LOADED_ALREADY: c_int = 1 | 4; // RTLD_LAZY, RTLD_NOLOAD of glibc and musl
    unsafe extern "C" {
        fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
        fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    // SAFETY: the declarations are POSIX's; both strings end with a zero byte. Nothing is loaded, so no foreign code runs.
    let symbol = unsafe {
        let handle = dlopen(library.as_ptr(), LAZY_AND_LOADED_ALREADY);
        if handle.is_null() {
            return Err(format!("{} is not loaded", library.to_string_lossy()));
        }
        dlsym(handle, c"GOMP_parallel".as_ptr()) // in the library and all that it depends on
    };
    if symbol.is_null() {
        return Err(format!(
            "{} uses no OpenMP runtime with GOMP_parallel",
            library.to_string_lossy()
        ));
    }
    // SAFETY: a symbol of this name is the entry of GCC's OpenMP runtime, or of one with its interface, and has had this signature since GCC 4.9. The
    // handle is never closed, so the code stays.
    Ok(unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) })
}

#[cfg(not(target_os = "linux"))]
fn find(_library: &CStr) -> std::result::Result<Parallel, String> {
    Err("the OpenMP runtime of torch is known on Linux only".to_owned())
}

/// What the threads of a team share.
struct Shared<'a> {
    work: &'a (dyn Fn() + Sync),
    panicked: AtomicBool,
}

/// Runs `work` once on each of some threads, at most `threads`, the caller's among them; returns when all have ended.
///
/// # Errors
/// [`Error::State`] if `work` panicked.
pub(super) fn run(threads: usize, work: &(dyn Fn() + Sync)) -> Result<()> {
    let shared = Shared {
        work,
        panicked: AtomicBool::new(false),
    };
    let argument = std::ptr::from_ref(&shared).cast_mut().cast::<c_void>();
    match PARALLEL.get() {
        Some(Ok(parallel)) if threads > 1 => {
            // SAFETY: `parallel` is GOMP_parallel (`find`). It calls `enter` with `argument` on its threads and returns only when all calls have
            // returned, so `shared` outlives them; they only read it, and it is Sync. `enter` never unwinds.
            unsafe {
                parallel(enter, argument, u32::try_from(threads).unwrap_or(u32::MAX), 0);
            }
        }
        // SAFETY: `argument` is `shared`, as `enter` wants it.
        _ => unsafe { enter(argument) },
    }
    if shared.panicked.into_inner() {
        return Err(Error::State(
            "internal error: attention panicked, see stderr: expected no panic; please report it".to_owned(),
        ));
    }
    Ok(())
}

/// # Safety
/// `argument` points to a [`Shared`] that lives until the call returns.
unsafe extern "C" fn enter(argument: *mut c_void) {
    // SAFETY: what the caller promises.
    let shared = unsafe { &*argument.cast::<Shared<'_>>() };
    if catch_unwind(AssertUnwindSafe(|| (shared.work)())).is_err() {
        shared.panicked.store(true, Ordering::Relaxed);
    }
}
