//! Conversion of core errors to the exceptions of `prefixfast.errors`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use prefixfast_core::Error;
use pyo3::prelude::*;

/// Runs core code without the GIL. A panic in the core or in a dependency becomes a `PrefixFastError`.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> prefixfast_core::Result<T> + Send,
) -> PyResult<T> {
    py.detach(|| catch_panic(work)).map_err(|error| raise(py, &error))
}

/// Runs short core code with the GIL held. A panic becomes a `PrefixFastError`.
pub(crate) fn guarded<T>(py: Python<'_>, work: impl FnOnce() -> prefixfast_core::Result<T>) -> PyResult<T> {
    catch_panic(work).map_err(|error| raise(py, &error))
}

fn catch_panic<T>(work: impl FnOnce() -> prefixfast_core::Result<T>) -> prefixfast_core::Result<T> {
    let internal = || {
        Error::State("internal error: the core panicked, see stderr: expected no panic; please report it".to_owned())
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(internal()))
}

/// Python exception of an error.
pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let errors = || py.import("prefixfast.errors");
    let name = match error {
        Error::Config(_) => "ConfigError",
        Error::Data(_) => "DataError",
        Error::UnknownPrefix(_) => "UnknownPrefixError",
        Error::Request(_) => "RequestError",
        Error::Capacity {
            limit,
            needed,
            available,
        } => {
            let made = errors().and_then(|module| {
                let arguments = (limit.name(), *needed, *available);
                module.getattr("capacity_error")?.call1(arguments)
            });
            return made.map_or_else(|other| other, PyErr::from_value);
        }
        Error::State(_) => "PrefixFastError",
    };
    let made = errors()
        .and_then(|module| module.getattr(name))
        .and_then(|class| class.call1((error.to_string(),)));
    match made {
        Ok(exception) => PyErr::from_value(exception),
        Err(other) => other,
    }
}
