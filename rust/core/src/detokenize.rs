//! Text of one growing sequence of ids.

use crate::error::Result;
use crate::tokenize::{Tokenizer, unsigned};

const REPLACEMENT: char = '\u{FFFD}';

/// Turns ids into text as they come: all results of [`Stream::push`] and [`Stream::finish`], joined, are the text of all ids.
///
/// A decoder's text is not the sum of its tokens' texts (leading spaces, characters of several tokens), so each time the last piece that
/// gave text is decoded twice, without and with the new ids, and the difference is the news. Text that may still change is held back: an
/// unfinished character (it ends in U+FFFD) and, with a byte-fallback decoder, a run of byte tokens.
#[derive(Debug, Clone)]
pub struct Stream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    /// The last piece that gave text, then the ids that have not.
    ids: Vec<u32>,
    /// How many of `ids` have given their text.
    read: usize,
}

impl Stream {
    pub(crate) fn new(tokenizer: Tokenizer, skip_special_tokens: bool) -> Self {
        Self {
            tokenizer,
            skip_special_tokens,
            ids: Vec::new(),
            read: 0,
        }
    }

    /// Adds ids and returns the text that is certain now.
    ///
    /// # Errors
    /// [`crate::Error::Data`] for a negative id; the stream is then unchanged.
    pub fn push(&mut self, ids: &[i32]) -> Result<String> {
        self.ids.extend(unsigned(ids)?);
        let (old, new) = self.texts()?;
        let open = new.ends_with(REPLACEMENT) || self.tokenizer.is_open_byte(&self.ids, self.skip_special_tokens);
        if new.len() <= old || open {
            return Ok(String::new());
        }
        self.ids.drain(..self.read);
        self.read = self.ids.len();
        Ok(tail(&new, old))
    }

    /// Returns what was held back and starts over.
    ///
    /// # Errors
    /// [`crate::Error::Data`] if the decoder refuses the ids.
    pub fn finish(&mut self) -> Result<String> {
        let (old, new) = self.texts()?;
        self.ids.clear();
        self.read = 0;
        Ok(tail(&new, old))
    }

    /// Length of the text already given, and the text of all ids at hand.
    fn texts(&self) -> Result<(usize, String)> {
        let old = self
            .tokenizer
            .decode(&self.ids[..self.read], self.skip_special_tokens)?;
        let new = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok((old.len(), new))
    }
}

fn tail(text: &str, from: usize) -> String {
    text.get(from..).unwrap_or_default().to_owned()
}
