//! Streaming detokenization: the text of one growing sequence of ids.

use crate::error::Result;
use crate::tokenize::{Tokenizer, to_unsigned};

const REPLACEMENT: char = '\u{FFFD}';

/// Streaming decoder. All results of [`Stream::push`] and [`Stream::finish`], joined, are the text of all ids.
///
/// The text of a sequence is not the concatenation of its tokens' texts, because of leading spaces and of characters
/// that span several tokens. The ids of the last piece of text are therefore decoded twice, without and with the ids
/// that follow, and the difference is the new text. Text that can still change is held back. This is an incomplete
/// character, which decodes to U+FFFD at the end, and, with a byte-fallback decoder, a run of byte tokens.
#[derive(Debug, Clone)]
pub struct Stream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    /// Ids of the last piece of text, then the ids whose text has not been returned.
    ids: Vec<u32>,
    /// Number of `ids` whose text has been returned.
    num_returned: usize,
}

impl Stream {
    pub(crate) fn new(tokenizer: Tokenizer, skip_special_tokens: bool) -> Self {
        Self {
            tokenizer,
            skip_special_tokens,
            ids: Vec::new(),
            num_returned: 0,
        }
    }

    /// Adds ids and returns the text that can no longer change.
    ///
    /// # Errors
    /// [`crate::Error::Data`] for a negative id. The stream is unchanged then.
    pub fn push(&mut self, ids: &[i32]) -> Result<String> {
        self.ids.extend(to_unsigned(ids)?);
        let (old, new) = self.texts()?;
        let is_incomplete =
            new.ends_with(REPLACEMENT) || self.tokenizer.ends_in_byte_token(&self.ids, self.skip_special_tokens);
        if new.len() <= old || is_incomplete {
            return Ok(String::new());
        }
        self.ids.drain(..self.num_returned);
        self.num_returned = self.ids.len();
        Ok(tail(&new, old))
    }

    /// Returns the text that was held back, and resets the stream.
    ///
    /// # Errors
    /// [`crate::Error::Data`] if the decoder refuses the ids.
    pub fn finish(&mut self) -> Result<String> {
        let (old, new) = self.texts()?;
        self.ids.clear();
        self.num_returned = 0;
        Ok(tail(&new, old))
    }

    /// Length of the text of the ids already returned, and text of all `ids`.
    fn texts(&self) -> Result<(usize, String)> {
        let old = self
            .tokenizer
            .decode(&self.ids[..self.num_returned], self.skip_special_tokens)?;
        let new = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok((old.len(), new))
    }
}

fn tail(text: &str, from: usize) -> String {
    text.get(from..).unwrap_or_default().to_owned()
}
