//! The one error type.

use std::fmt;

/// A result with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong. The text of each says what was expected, what came and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// An argument, a setting or a description is wrong.
    Config(String),
    /// A row of the caller's data is wrong.
    Data(String),
    /// A prefix number that nobody registered.
    UnknownPrefix(i64),
    /// One request is wrong or can never be served.
    Request(String),
    /// A buffer or a count is too small.
    Capacity(String),
    /// The caller broke the order of calls.
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
