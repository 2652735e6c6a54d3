//! Error type of the crate.

use std::fmt;

/// Result with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Limit of a request, a batch or a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Decode rows of a request.
    DecodeRows,
    /// Arena rows of a request, those of its prefixes included.
    ArenaRows,
    /// Arena rows of the prefixes of a request.
    PrefixRows,
    /// Tokens of the encoder and of the prompt of a request, which one step computes.
    EncoderTokens,
    /// Keys that a query of a request sees, or int32 entries of a step's tables.
    TableEntries,
    /// int32 entries of the buffer for a step's tables.
    StepBuffer,
    /// Keys of a sequence of a packed forward, those of its prefixes included.
    SequenceKeys,
    /// Pairs of a token and a prefix of a packed forward.
    TokenPrefixPairs,
    /// Prefix rows that the sequences of a packed forward see.
    VisiblePrefixRows,
    /// Keys of all sequences of a packed forward, without those of their prefixes.
    PackedKeys,
    /// Tokens of a packed forward in the padded layout.
    PaddedTokens,
    /// Token ids of one call.
    TokenIds,
}

impl Limit {
    /// Name of the limit.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DecodeRows => "decode_rows",
            Self::ArenaRows => "arena_rows",
            Self::PrefixRows => "prefix_rows",
            Self::EncoderTokens => "encoder_tokens",
            Self::TableEntries => "table_entries",
            Self::StepBuffer => "step_buffer",
            Self::SequenceKeys => "sequence_keys",
            Self::TokenPrefixPairs => "token_prefix_pairs",
            Self::VisiblePrefixRows => "visible_prefix_rows",
            Self::PackedKeys => "packed_keys",
            Self::PaddedTokens => "padded_tokens",
            Self::TokenIds => "token_ids",
        }
    }

    /// Refuses a number that exceeds the limit.
    pub(crate) fn check(self, needed: usize, available: usize) -> Result<()> {
        if needed > available {
            return Err(Error::Capacity {
                limit: self,
                needed,
                available,
            });
        }
        Ok(())
    }
}

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
    /// Number that exceeds a limit. The caller knows which options change the limit.
    Capacity {
        /// Limit that is exceeded.
        limit: Limit,
        /// Number that exceeds the limit. It saturates.
        needed: usize,
        /// Largest number that is possible, or the size of a buffer.
        available: usize,
    },
    /// Call that is not allowed in the current state.
    State(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(text) | Self::Data(text) | Self::Request(text) | Self::State(text) => f.write_str(text),
            Self::Capacity {
                limit,
                needed,
                available,
            } => write!(f, "{}: {needed} needed, {available} available", limit.name()),
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
