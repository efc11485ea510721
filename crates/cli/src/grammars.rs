//! Grammars for a worker's stage: compiled for its model's tokenizer, which is read when the first request brings a grammar.

use mlxnode_compute::{Grammar, GrammarError, Grammars, TokenConstraint};
use mlxnode_text::grammar::{Matcher, Vocabulary};
use mlxnode_text::{TextFiles, Tokenizer};
use std::path::PathBuf;

/// Compiles grammars for the model of a folder. The fronts have tried its tokenizer in their sandbox, and the grammar too.
pub struct ModelGrammars {
    folder: PathBuf,
    /// Token ids that the model knows.
    size: usize,
    vocabulary: Option<Vocabulary>,
}

impl ModelGrammars {
    /// Reads nothing yet. `size` is the number of token ids that the model knows.
    pub fn new(folder: PathBuf, size: usize) -> Self {
        Self { folder, size, vocabulary: None }
    }

    fn vocabulary(&mut self) -> Result<&Vocabulary, GrammarError> {
        let made = match self.vocabulary.take() {
            Some(made) => made,
            None => {
                let files = TextFiles::read(&self.folder).map_err(told)?;
                let tokenizer = Tokenizer::from_files(&files).map_err(told)?;
                Vocabulary::new(&tokenizer, self.size).map_err(told)?
            }
        };
        Ok(self.vocabulary.insert(made))
    }
}

impl Grammars for ModelGrammars {
    fn constraint(&mut self, grammar: &Grammar) -> Result<Box<dyn TokenConstraint>, GrammarError> {
        Ok(Box::new(Followed(self.vocabulary()?.compile(grammar.into()).map_err(told)?)))
    }
}

/// An answer on its way through a grammar.
struct Followed(Matcher);

impl TokenConstraint for Followed {
    fn mask(&mut self) -> Result<&[u32], GrammarError> {
        self.0.mask().map_err(told)
    }

    fn accept(&mut self, token: u32) -> Result<bool, GrammarError> {
        self.0.accept(token).map_err(told)
    }
}

fn told(error: impl std::fmt::Display) -> GrammarError {
    GrammarError(error.to_string())
}
