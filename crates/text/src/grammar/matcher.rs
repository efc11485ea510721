//! One answer on its way through a language.

use super::source::{GrammarError, shortened};
use super::vocabulary::Vocabulary;
use llguidance::Matcher as LibraryMatcher;

/// Where an answer stands in its language. A clone goes its own way.
#[derive(Clone)]
pub struct Matcher {
    inner: LibraryMatcher,
    vocabulary: Vocabulary,
    mask: Vec<u32>,
    /// The sentence is over and its end token came.
    ended: bool,
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").field("vocabulary", &self.vocabulary).field("ended", &self.ended).finish()
    }
}

impl Matcher {
    pub(super) fn new(inner: LibraryMatcher, vocabulary: Vocabulary) -> Self {
        let mask = vec![0; vocabulary.size.div_ceil(32)];
        Self { inner, vocabulary, mask, ended: false }
    }

    /// The tokens that may come next: bit `id % 32` of word `id / 32`, for every id of the vocabulary. At least one bit is set: behind a
    /// complete sentence those of the tokens that end an answer.
    ///
    /// # Errors
    /// [`GrammarError::TooMuchWork`]
    pub fn mask(&mut self) -> Result<&[u32], GrammarError> {
        let allowed = self.inner.compute_mask_or_eos().map_err(too_much)?;
        let words = allowed.as_slice();
        let size = self.vocabulary.size;
        for (index, word) in self.mask.iter_mut().enumerate() {
            *word = words.get(index).copied().unwrap_or_default();
        }
        if let Some(last) = self.mask.last_mut()
            && !size.is_multiple_of(32)
        {
            *last &= (1 << (size % 32)) - 1;
        }
        // The library knows one end of a text; models have several, and all of them end it.
        let may_end = self.inner.is_stopped() || self.inner.is_accepting().map_err(too_much)?;
        for end in self.vocabulary.ends.iter() {
            let (word, bit) = ((*end / 32) as usize, 1 << (*end % 32));
            match may_end {
                true => self.mask[word] |= bit,
                false => self.mask[word] &= !bit,
            }
        }
        Ok(&self.mask)
    }

    /// Takes the token that was chosen. True once the answer is complete: nothing but an end may follow, and it need not come.
    ///
    /// # Errors
    /// [`GrammarError::Token`] for a token outside of the mask; the matcher stays where it was.
    pub fn accept(&mut self, token: u32) -> Result<bool, GrammarError> {
        if self.ended {
            return Err(GrammarError::Token { token });
        }
        if self.vocabulary.ends.contains(&token) {
            let may_end = self.inner.is_stopped() || self.inner.is_accepting().map_err(too_much)?;
            self.ended = may_end;
            return if may_end { Ok(true) } else { Err(GrammarError::Token { token }) };
        }
        if self.inner.is_stopped() || token as usize >= self.vocabulary.size {
            return Err(GrammarError::Token { token });
        }
        match self.inner.try_consume_tokens(&[token]).map_err(too_much)? {
            0 => Err(GrammarError::Token { token }),
            _ => Ok(self.inner.is_stopped()),
        }
    }

    /// Takes back the last `tokens` tokens, an end among them included.
    ///
    /// # Errors
    /// When there were not that many.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), GrammarError> {
        let of_library = tokens.saturating_sub(usize::from(self.ended && tokens > 0));
        self.inner.rollback(of_library).map_err(too_much)?;
        self.ended &= tokens == 0;
        Ok(())
    }

    /// Is what came so far a sentence?
    pub fn is_complete(&mut self) -> bool {
        self.ended || self.inner.is_stopped() || self.inner.is_accepting().unwrap_or(false)
    }
}

fn too_much(error: impl std::fmt::Display) -> GrammarError {
    GrammarError::TooMuchWork { reason: shortened(&error.to_string()) }
}
