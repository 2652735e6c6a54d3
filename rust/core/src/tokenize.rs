//! Tokenization: batches of text to token ids and back.

use std::str::FromStr;
use std::sync::Arc;

use rayon::prelude::*;

use crate::detokenize::Stream;
use crate::error::{Error, Limit, Result};
use crate::thread_pool::thread_pool;

/// Smallest number of texts that is processed in parallel. For fewer, waking the threads costs more than it saves.
const MIN_PARALLEL: usize = 8;

/// Concatenated lists of ids. List `i` is `ids[indptr[i]..indptr[i + 1]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ragged {
    /// Ids of all lists.
    pub ids: Vec<i32>,
    /// Borders between the lists, one more than there are lists.
    pub indptr: Vec<i32>,
}

/// Tokenizer of a `tokenizer.json`, with truncation and padding disabled.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// Whether the decoder fuses byte tokens (`<0x..>`) into characters.
    byte_fallback: bool,
}

impl Tokenizer {
    /// Tokenizer from the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Config`] if the text is not that of a tokenizer.
    pub fn new(json: &str) -> Result<Self> {
        let refuse = |error: tokenizers::Error| {
            Error::Config(format!(
                "this is no tokenizer ({error}): expected the text of a tokenizer.json; pass the file's content, not \
                 its path"
            ))
        };
        let mut inner = tokenizers::Tokenizer::from_str(json).map_err(refuse)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(refuse)?;
        let decoder = inner
            .get_decoder()
            .and_then(|decoder| serde_json::to_string(decoder).ok());
        let byte_fallback = decoder.is_some_and(|text| text.contains("\"ByteFallback\""));
        Ok(Self {
            inner: Arc::new(inner),
            byte_fallback,
        })
    }

    /// Number of tokens, including added ones.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Id of a token, `None` if there is no such token.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Token of an id, `None` if there is no such id.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// New stream that decodes one growing sequence of ids.
    #[must_use]
    pub fn stream(&self, skip_special_tokens: bool) -> Stream {
        Stream::new(self.clone(), skip_special_tokens)
    }

    /// Ids of each text.
    ///
    /// * `add_special_tokens`: whether the tokenizer's template adds its special tokens.
    ///
    /// # Errors
    /// [`Error::Data`] if the tokenizer refuses a text. [`Error::Capacity`] for more than `i32::MAX` ids.
    /// [`Error::Config`] if the thread pool cannot be built ([`thread_pool`]).
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], add_special_tokens: bool) -> Result<Ragged> {
        let one = |(row, text): (usize, &T)| {
            let encoding = self.inner.encode_fast(text.as_ref(), add_special_tokens);
            encoding.map(|encoding| encoding.get_ids().to_vec()).map_err(|error| {
                Error::Data(format!(
                    "the tokenizer refused text {row} ({error}): expected text in its vocabulary; change the text"
                ))
            })
        };
        let lists: Vec<Vec<u32>> = if texts.len() < MIN_PARALLEL {
            texts.iter().enumerate().map(one).collect::<Result<_>>()?
        } else {
            thread_pool()?.install(|| texts.par_iter().enumerate().map(one).collect::<Result<_>>())?
        };
        ragged(&lists)
    }

    /// Text of each list of ids.
    ///
    /// * `skip_special_tokens`: whether special tokens are left out.
    ///
    /// # Errors
    /// [`Error::Config`] if `indptr` descends or does not run from 0 to the number of ids, or if the thread pool cannot
    /// be built ([`thread_pool`]). [`Error::Data`] for a negative id.
    pub fn decode_batch(&self, ids: &[i32], indptr: &[i32], skip_special_tokens: bool) -> Result<Vec<String>> {
        let borders = borders(ids.len(), indptr)?;
        let ids = to_unsigned(ids)?;
        let one = |pair: &[usize]| self.decode(&ids[pair[0]..pair[1]], skip_special_tokens);
        if borders.len() <= MIN_PARALLEL {
            borders.windows(2).map(one).collect()
        } else {
            thread_pool()?.install(|| borders.par_windows(2).map(one).collect())
        }
    }

    /// Text of one list of ids.
    ///
    /// # Errors
    /// [`Error::Data`] if the tokenizer's decoder refuses the ids.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner.decode(ids, skip_special_tokens).map_err(|error| {
            Error::Data(format!(
                "the tokenizer cannot decode these ids ({error}): expected ids of its own vocabulary; check \
                 the tokenizer"
            ))
        })
    }

    /// Whether the ids end in a byte token, whose text a later byte token can still change.
    pub(crate) fn ends_in_byte_token(&self, ids: &[u32], skip_special_tokens: bool) -> bool {
        if !self.byte_fallback {
            return false;
        }
        let is_special = |token: &str| skip_special_tokens && self.inner.get_added_vocabulary().is_special_token(token);
        let last = ids
            .iter()
            .rev()
            .filter_map(|id| self.id_to_token(*id))
            .find(|token| !is_special(token));
        last.is_some_and(|token| token.len() == 6 && token.starts_with("<0x") && token.ends_with('>'))
    }
}

/// Non-negative ids in the type of the tokenizers crate.
pub(crate) fn to_unsigned(ids: &[i32]) -> Result<Vec<u32>> {
    let convert = |(place, id): (usize, &i32)| {
        u32::try_from(*id).map_err(|_| {
            Error::Data(format!(
                "id {id} at place {place}: expected 0 or more; remove padding before decoding"
            ))
        })
    };
    ids.iter().enumerate().map(convert).collect()
}

fn ragged(lists: &[Vec<u32>]) -> Result<Ragged> {
    let total = lists.iter().map(Vec::len).sum();
    let too_many = || Error::Capacity {
        limit: Limit::TokenIds,
        needed: total,
        available: usize::try_from(i32::MAX).unwrap_or(usize::MAX),
    };
    let mut ids = Vec::with_capacity(total);
    let mut indptr = Vec::with_capacity(lists.len() + 1);
    indptr.push(0);
    for list in lists {
        for id in list {
            ids.push(i32::try_from(*id).map_err(|_| too_many())?);
        }
        indptr.push(i32::try_from(ids.len()).map_err(|_| too_many())?);
    }
    Ok(Ragged { ids, indptr })
}

fn borders(count: usize, indptr: &[i32]) -> Result<Vec<usize>> {
    let borders: Vec<usize> = indptr
        .iter()
        .filter_map(|border| usize::try_from(*border).ok())
        .collect();
    let fits = borders.len() == indptr.len() && borders.first() == Some(&0) && borders.last() == Some(&count);
    if fits && borders.is_sorted() {
        return Ok(borders);
    }
    Err(Error::Config(format!(
        "indptr does not fit the ids: expected non-descending borders that start at 0 and end at {count}; pass the \
         indptr of these ids"
    )))
}
