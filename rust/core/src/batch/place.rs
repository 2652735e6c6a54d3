//! Place of a prefix in a sequence, and the positions of the sequence's tokens.

use crate::error::{Error, Result};

/// Place of a prefix in a sequence, with its number in the Python package.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Place {
    /// 0: before the first token.
    #[default]
    Front,
    /// 1: before the last prompt token. The tokens before it count from the front.
    Infix,
    /// 2: before the last prompt token, at fixed positions. The tokens before it count down from -1.
    FixedInfix,
}

impl Place {
    /// Place of the given number.
    ///
    /// # Errors
    /// [`Error::Config`] for a number other than 0, 1 and 2.
    pub fn from_number(number: i64) -> Result<Self> {
        match number {
            0 => Ok(Self::Front),
            1 => Ok(Self::Infix),
            2 => Ok(Self::FixedInfix),
            _ => Err(Error::Config(format!(
                "place of a prefix is {number}: expected 0 (before the first token), 1 or 2 (before the last prompt \
                 token)"
            ))),
        }
    }

    /// Whether tokens before the last prompt token do not see the prefix.
    pub(crate) fn is_infix(self) -> bool {
        self != Self::Front
    }
}

/// Positions of the tokens of a sequence, and the token from which on its infixes are seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Positions {
    /// Position of the first token.
    first: i32,
    /// First token that sees the infixes, 0 for a sequence without infixes.
    pub(crate) split: i32,
    /// Number of positions between the tokens before and after the split.
    gap: i32,
}

impl Positions {
    /// Positions of a sequence.
    ///
    /// Of several prefixes at one place the largest `pos_start` counts.
    ///
    /// * `prefixes`: place and `pos_start` of each prefix of the sequence.
    /// * `last_prompt_token`: index of the last prompt token.
    pub(crate) fn new(prefixes: impl Iterator<Item = (Place, i32)>, last_prompt_token: i32) -> Self {
        let mut made = Self::default();
        let mut is_fixed = false;
        for (place, pos_start) in prefixes {
            if place.is_infix() {
                made.split = last_prompt_token;
                made.gap = made.gap.max(pos_start);
                is_fixed |= place == Place::FixedInfix;
            } else {
                made.first = made.first.max(pos_start);
            }
        }
        if is_fixed {
            made.first = -last_prompt_token;
        }
        made
    }

    /// Position of a token of the sequence.
    pub(crate) fn at(&self, token: i32) -> i32 {
        self.first + token + if token < self.split { 0 } else { self.gap }
    }
}
