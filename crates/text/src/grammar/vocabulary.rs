//! A tokenizer's vocabulary as a tree of bytes, made once per model.

use super::matcher::Matcher;
use super::source::{GrammarError, Source};
use crate::Tokenizer;
use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use llguidance::{Matcher as LibraryMatcher, ParserFactory};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

/// What grammars are compiled for. Cheap to clone; hundred thousand tokens take some hundred milliseconds to build.
#[derive(Clone)]
pub struct Vocabulary {
    factory: Arc<ParserFactory>,
    /// Tokens that end an answer; only these may follow a finished sentence.
    pub(super) ends: Arc<Vec<u32>>,
    pub(super) size: usize,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("size", &self.size).field("ends", &self.ends).finish()
    }
}

/// Bounds of one grammar. The library's own are for servers with time; these keep a compilation under about a second and a step
/// under some ten milliseconds.
fn limits() -> ParserLimits {
    ParserLimits {
        max_grammar_size: 200_000,
        max_lexer_states: 50_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

impl Vocabulary {
    /// The vocabulary of this tokenizer for a model of `size` token ids (which may be more than the tokenizer has). Special tokens are
    /// no text: a grammar names them as `<[ID]>`.
    ///
    /// # Errors
    /// When no token ends a text, or the tokens cannot be laid out as a tree.
    pub fn new(tokenizer: &Tokenizer, size: usize) -> Result<Self, GrammarError> {
        let unusable = |reason: String| GrammarError::Vocabulary { reason };
        let ends: Vec<u32> =
            tokenizer.eos_tokens().iter().copied().filter(|end| (*end as usize) < size).collect();
        let Some(end) = tokenizer.eos_token_id().filter(|end| ends.contains(end)).or(ends.first().copied())
        else {
            return Err(unusable("it has no token that ends an answer".to_owned()));
        };
        let count = u32::try_from(size).map_err(|_| unusable(format!("{size} tokens are too many")))?;
        let words: Vec<Vec<u8>> = (0..count)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                match tokenizer.is_special(id) || ends.contains(&id) {
                    true => [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat(),
                    false => bytes,
                }
            })
            .collect();
        let built = catch_unwind(AssertUnwindSafe(|| {
            let trie = TokTrie::from(&TokRxInfo::new(count, end), &words);
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = SlicedBiasComputer::general_slices();
            ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
        }));
        let mut factory = match built {
            Ok(Ok(factory)) => factory,
            Ok(Err(error)) => return Err(unusable(super::source::shortened(&error.to_string()))),
            Err(_) => return Err(unusable("its tokens contradict each other".to_owned())),
        };
        *factory.limits_mut() = limits();
        factory.quiet();
        Ok(Self { factory: Arc::new(factory), ends: Arc::new(ends), size })
    }

    /// Compiles a language. Blocking: a large schema takes a second.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`] says what is wrong.
    pub fn compile(&self, source: Source<'_>) -> Result<Matcher, GrammarError> {
        let grammar = source.to_library()?;
        let compiled = catch_unwind(AssertUnwindSafe(|| {
            let mut matcher = LibraryMatcher::new(self.factory.create_parser(grammar));
            match matcher.get_error() {
                Some(reason) => Err(reason),
                // The first mask shows what is wrong with a language that has no sentence at all.
                None => matcher.compute_mask_or_eos().map(|_| matcher).map_err(|error| error.to_string()),
            }
        }));
        match compiled {
            Ok(Ok(matcher)) => Ok(Matcher::new(matcher, self.clone())),
            Ok(Err(reason)) => Err(source.invalid(reason)),
            Err(_) => Err(source.invalid("the compiler gave up on it")),
        }
    }
}
