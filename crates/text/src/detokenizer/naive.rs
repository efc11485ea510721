//! The detokenizer for decoders without a known shape: decodes the current line again with every token.

use crate::Tokenizer;

/// Tokens of one line at most. mlx-lm has no bound, and a line without end would make each token dearer than the one
/// before; honest lines are far shorter.
const MAX_LINE: usize = 2048;

/// The current line: its tokens, and how much of its text was given out.
#[derive(Debug, Default)]
pub(crate) struct LineDecoder {
    tokens: Vec<u32>,
    /// In characters, because the text before may change under us.
    given: usize,
}

impl LineDecoder {
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.tokens.push(id);
        let mut text = tokenizer.decode(&self.tokens, false).unwrap_or_default();
        if text.ends_with('\u{FFFD}') {
            text.truncate(text.trim_end_matches('\u{FFFD}').len());
        } else if tokenizer.drops_spaces() && text.ends_with(' ') {
            text.pop(); // the space goes if punctuation follows
        }
        let fresh: String = text.chars().skip(self.given).collect();
        if text.ends_with('\n') || self.tokens.len() >= MAX_LINE {
            *self = Self::default();
        } else {
            self.given = text.chars().count();
        }
        fresh
    }

    pub(crate) fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let line = std::mem::take(self);
        let text = tokenizer.decode(&line.tokens, false).unwrap_or_default();
        text.chars().skip(line.given).collect()
    }
}
