//! Error type of the crate.

use std::fmt;

/// Result with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Error of any operation of this crate. The message says what was expected, what came, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// Wrong argument, setting or description.
    Config(String),
    /// Wrong row in the caller's data.
    Data(String),
    /// Number of a prefix that is not registered.
    UnknownPrefix(i64),
    /// Wrong request, or one that can never be served.
    Request(String),
    /// Buffer that is too small, or count that is too large.
    Capacity(String),
    /// Call that is not allowed in the current state.
    State(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(text) | Self::Data(text) | Self::Request(text) | Self::Capacity(text) | Self::State(text) => {
                f.write_str(text)
            }
            Self::UnknownPrefix(prefix) => {
                write!(
                    f,
                    "prefix {prefix} is not known: expected the number of a registered prefix; register it first"
                )
            }
        }
    }
}

impl std::error::Error for Error {}
