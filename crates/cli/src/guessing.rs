//! The flags that let tokens be guessed ahead, which makes answers faster and changes none of them.

use clap::Args;

/// mlx-lm's number of tokens for a draft model.
const DRAFT_TOKENS: u8 = 3;
/// Looking text up costs next to nothing, so more is tried at once.
const LOOKUP_TOKENS: u8 = 8;

/// How tokens are guessed.
#[derive(Clone, Debug, Args)]
pub struct GuessFlags {
    /// A smaller model with the same tokenizer that guesses tokens ahead: the same answer, sooner.
    #[arg(long, value_name = "MODEL", conflicts_with = "prompt_lookup")]
    draft_model: Option<String>,
    /// Guess tokens by what followed the last N ones earlier in the text: good where an answer repeats the prompt. 1 to 16, alone: 3.
    #[arg(
        long,
        value_name = "N",
        num_args = 0..=1,
        default_missing_value = "3",
        value_parser = clap::value_parser!(u8).range(1..=16),
        allow_negative_numbers = true
    )]
    prompt_lookup: Option<u8>,
    /// How many tokens are guessed at once, 1 to 32. Default: 3 of a draft model, 8 of the prompt.
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u8).range(1..=32),
        allow_negative_numbers = true
    )]
    num_draft_tokens: Option<u8>,
}

/// Who guesses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guesses {
    /// Nobody.
    Never,
    /// A draft model, by its name.
    Draft {
        /// As the person named it.
        model: String,
        /// Tokens at once.
        tokens: usize,
    },
    /// Earlier text.
    Lookup {
        /// Most tokens that must have come before.
        ngram: usize,
        /// Tokens at once.
        tokens: usize,
    },
}

impl GuessFlags {
    /// The same as data.
    pub fn guesses(&self) -> Guesses {
        let tokens = |default| usize::from(self.num_draft_tokens.unwrap_or(default));
        match (&self.draft_model, self.prompt_lookup) {
            (Some(model), _) => Guesses::Draft { model: model.clone(), tokens: tokens(DRAFT_TOKENS) },
            (None, Some(ngram)) => {
                Guesses::Lookup { ngram: usize::from(ngram), tokens: tokens(LOOKUP_TOKENS) }
            }
            (None, None) => Guesses::Never,
        }
    }

    /// Tokens at once, when that was given.
    pub fn at_once(&self) -> Option<u32> {
        self.num_draft_tokens.map(u32::from)
    }

    /// The first flag that was given and that a cluster decides when a model is loaded.
    pub fn given(&self) -> Option<&'static str> {
        let draft = self.draft_model.as_ref().map(|_| "--draft-model");
        draft.or(self.prompt_lookup.map(|_| "--prompt-lookup"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        guess: GuessFlags,
    }

    #[test]
    fn flags_say_who_guesses() {
        let draft = |tokens| Guesses::Draft { model: "m".into(), tokens };
        for (words, expected) in [
            ("x", Some(Guesses::Never)),
            ("x --num-draft-tokens 5", Some(Guesses::Never)),
            ("x --draft-model m", Some(draft(3))),
            ("x --draft-model m --num-draft-tokens 5", Some(draft(5))),
            ("x --prompt-lookup", Some(Guesses::Lookup { ngram: 3, tokens: 8 })),
            ("x --prompt-lookup 2 --num-draft-tokens 4", Some(Guesses::Lookup { ngram: 2, tokens: 4 })),
            ("x --prompt-lookup 17", None),
            ("x --prompt-lookup --draft-model m", None),
            ("x --draft-model m --num-draft-tokens 33", None),
        ] {
            let flags = Flags::try_parse_from(words.split(' ')).ok();
            assert_eq!(flags.map(|flags| flags.guess.guesses()), expected, "{words}");
        }
    }
}
