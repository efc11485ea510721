//! Loose generation parameters into a [`ValidRequest`] that cannot be wrong.
//!
//! The API takes what clients send, where 0 and absent mean "the default"; everything behind this door takes a
//! [`SequenceSpec`] whose numbers are in range, fit the model's context and carry a seed. Text (tokenizing, chat templates,
//! stop tokens given as text) is settled before: only ids arrive here.

use mlxnode_compute::{Grammar, LogprobRequest, Output, Penalty, Sampling, SamplingError, SequenceSpec, Xtc};
use std::collections::BTreeMap;

/// Tokens to generate when the request does not say.
pub const DEFAULT_MAX_TOKENS: usize = 256;
/// Most stop strings of a request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 256;
/// Most tokens with a logit bias.
pub const MAX_LOGIT_BIASES: usize = 1024;
/// Most tokens that end a sequence: the model's own and the request's.
pub const MAX_STOP_TOKENS: usize = 64;
/// Most candidates to report with a token.
pub const MAX_TOP_LOGPROBS: usize = 20;
/// Lately, when a penalty does not say how long: mlx-lm's default.
pub const DEFAULT_PENALTY_CONTEXT: usize = 20;
/// Above this every distribution is flat: the request surely means something else.
pub const MAX_TEMPERATURE: f32 = 100.0;

/// What a client may say about a generation, field by field as `GenerateRequest` has it. The default is all zeros: greedy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters {
    /// 0: [`DEFAULT_MAX_TOKENS`].
    pub max_tokens: u32,
    /// 0: greedy.
    pub temperature: f32,
    /// 0 or 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// 0 means 1.
    pub min_tokens_to_keep: u32,
    /// 0: off.
    pub top_k: u32,
    /// 0: off.
    pub xtc_probability: f32,
    /// 0 to 0.5.
    pub xtc_threshold: f32,
    /// Absent: `fresh_seed` is taken.
    pub seed: Option<u64>,
    /// Added to logits, by token.
    pub logit_bias: BTreeMap<u32, f32>,
    /// 0 or 1: off.
    pub repetition_penalty: f32,
    /// 0 means [`DEFAULT_PENALTY_CONTEXT`]; likewise below.
    pub repetition_context_size: u32,
    /// 0: off.
    pub presence_penalty: f32,
    /// See `repetition_context_size`.
    pub presence_context_size: u32,
    /// 0: off.
    pub frequency_penalty: f32,
    /// See `repetition_context_size`.
    pub frequency_context_size: u32,
    /// Texts that end the generation.
    pub stop: Vec<String>,
    /// Tokens that end the generation besides the model's own.
    pub extra_stop_tokens: Vec<u32>,
    /// Keep going past the model's own end tokens. Those in `extra_stop_tokens` still end it.
    pub ignore_eos: bool,
    /// Absent: no log-probabilities.
    pub top_logprobs: Option<u32>,
    /// Likewise for the prompt's tokens.
    pub prompt_logprobs: Option<u32>,
    /// What the answer has to look like.
    pub grammar: Option<Grammar>,
    /// Tokens that may be guessed ahead at once, but no more than the deployment does. Absent: as many as that; 0: none.
    pub num_draft_tokens: Option<u32>,
    /// Which draft model guesses: the deployment's own, by the name of its source, or [`OWN_DRAFT`]. The front refuses others.
    pub draft_model: Option<String>,
    /// An adapter of the deployment: its name, until the front puts what the workers call it in its place.
    pub adapter: Option<String>,
}

/// What mlx_lm.server calls the draft model that it was started with.
pub const OWN_DRAFT: &str = "default_model";

/// What the deployment allows.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelLimits {
    /// Token ids are below it.
    pub vocabulary: usize,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: usize,
    /// The model's end-of-sequence tokens.
    pub eos_tokens: Vec<u32>,
    /// Tokens that XTC never drops (newline and the end of sequence).
    pub xtc_special_tokens: Vec<u32>,
}

/// A request that every part behind the API takes as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidRequest {
    /// 1 to `context_tokens` - 1 ids below the vocabulary size.
    pub prompt: Vec<u32>,
    /// In range, and prompt + `max_tokens` fit the context.
    pub spec: SequenceSpec,
    /// Not empty strings, bounded.
    pub stop: Vec<String>,
    /// Were fewer tokens granted than asked for, because the context ends before?
    pub is_clipped: bool,
}

/// Why a request is refused. Names the field as the API spells it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Nothing to continue.
    #[error("the prompt is empty: it needs at least one token")]
    EmptyPrompt,
    /// No room for an answer.
    #[error(
        "the prompt has {tokens} tokens but the context of this deployment is {context}, and at least one is for the answer; \
         shorten the prompt or load the model with a larger context"
    )]
    PromptTooLong {
        /// In the prompt.
        tokens: usize,
        /// Of the deployment.
        context: usize,
    },
    /// A token that the model does not have.
    #[error("{field} has token {token}, but the vocabulary ends at {vocabulary}")]
    Token {
        /// Name of the field.
        field: &'static str,
        /// The id.
        token: u32,
        /// Number of tokens.
        vocabulary: usize,
    },
    /// More entries than allowed.
    #[error("{field} has {count} entries, but at most {most} are allowed")]
    TooMany {
        /// Name of the field.
        field: &'static str,
        /// How many came.
        count: usize,
        /// How many may.
        most: usize,
    },
    /// An empty or overlong stop string.
    #[error("a stop string has {bytes} bytes, but must have 1 to {MAX_STOP_BYTES}")]
    StopLength {
        /// Its length.
        bytes: usize,
    },
    /// A number out of its range.
    #[error("{parameter} is {value}, but must be {allowed}")]
    Range {
        /// Name of the field.
        parameter: &'static str,
        /// What was given.
        value: String,
        /// What would do.
        allowed: String,
    },
}

impl From<SamplingError> for RequestError {
    fn from(error: SamplingError) -> Self {
        Self::Range { parameter: error.parameter, value: error.value, allowed: error.allowed }
    }
}

impl ValidRequest {
    /// Checks everything and fills in the defaults. `fresh_seed` is the seed of a request that brings none: random, from the caller.
    ///
    /// # Errors
    /// [`RequestError`] names the first field that is wrong.
    pub fn new(
        prompt: Vec<u32>,
        parameters: Parameters,
        model: &ModelLimits,
        fresh_seed: u64,
    ) -> Result<Self, RequestError> {
        if prompt.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        let room = model.context_tokens.saturating_sub(prompt.len());
        if room == 0 {
            return Err(RequestError::PromptTooLong { tokens: prompt.len(), context: model.context_tokens });
        }
        check_tokens("prompt", &prompt, model)?;
        check_count("stop", parameters.stop.len(), MAX_STOP_STRINGS)?;
        if let Some(stop) = parameters.stop.iter().find(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES)
        {
            return Err(RequestError::StopLength { bytes: stop.len() });
        }
        check_count("logit_bias", parameters.logit_bias.len(), MAX_LOGIT_BIASES)?;
        check_tokens("extra_eos", &parameters.extra_stop_tokens, model)?;
        if parameters.temperature > MAX_TEMPERATURE {
            return Err(RequestError::Range {
                parameter: "temperature",
                value: parameters.temperature.to_string(),
                allowed: format!("between 0 and {MAX_TEMPERATURE}"),
            });
        }

        let wanted = match parameters.max_tokens {
            0 => DEFAULT_MAX_TOKENS,
            wanted => wanted as usize,
        };
        let is_clipped = parameters.max_tokens != 0 && wanted > room;
        let stop_tokens = stop_tokens(&parameters, model);
        check_count("extra_eos", stop_tokens.len(), MAX_STOP_TOKENS)?;
        let stop = parameters.stop.clone();
        if let Some(grammar) = &parameters.grammar
            && grammar.text().len() > Grammar::MAX_BYTES
        {
            return Err(RequestError::Range {
                parameter: "grammar",
                value: format!("{} bytes", grammar.text().len()),
                allowed: format!("at most {} bytes", Grammar::MAX_BYTES),
            });
        }
        let prompt_logprobs = parameters.prompt_logprobs.map(|top| LogprobRequest { top: top as usize });
        Sampling { logprobs: prompt_logprobs, ..Sampling::default() }.check(model.vocabulary)?;
        let (grammar, adapter) = (parameters.grammar.clone(), parameters.adapter.clone());
        let most_guesses = parameters.num_draft_tokens.map(|most| most as usize);
        let sampling = sampling(parameters, model, fresh_seed);
        sampling.check(model.vocabulary)?;
        Ok(Self {
            spec: SequenceSpec {
                most_guesses,
                stop_tokens,
                prompt_logprobs,
                grammar,
                adapter,
                ..SequenceSpec::new(prompt.len(), wanted.min(room), sampling)
            },
            prompt,
            stop,
            is_clipped,
        })
    }

    /// A prompt whose hidden vectors are asked for; nothing is generated.
    ///
    /// # Errors
    /// [`RequestError`] when the prompt is empty, too long, or not of this vocabulary.
    pub fn embedding(
        prompt: Vec<u32>,
        adapter: Option<String>,
        model: &ModelLimits,
    ) -> Result<Self, RequestError> {
        let parameters = Parameters { max_tokens: 1, adapter, ..Parameters::default() };
        let mut valid = Self::new(prompt, parameters, model, 0)?;
        valid.spec.output = Output::Embedding;
        Ok(valid)
    }

    /// The seed that is used.
    pub fn seed(&self) -> u64 {
        self.spec.sampling.seed
    }
}

fn check_tokens(field: &'static str, tokens: &[u32], model: &ModelLimits) -> Result<(), RequestError> {
    match tokens.iter().find(|token| **token as usize >= model.vocabulary) {
        Some(token) => Err(RequestError::Token { field, token: *token, vocabulary: model.vocabulary }),
        None => Ok(()),
    }
}

fn check_count(field: &'static str, count: usize, most: usize) -> Result<(), RequestError> {
    if count > most { Err(RequestError::TooMany { field, count, most }) } else { Ok(()) }
}

fn stop_tokens(parameters: &Parameters, model: &ModelLimits) -> Vec<u32> {
    let own = if parameters.ignore_eos { &[][..] } else { &model.eos_tokens };
    let mut tokens: Vec<u32> = own.iter().chain(&parameters.extra_stop_tokens).copied().collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Fills in the defaults; ranges are checked by [`Sampling::check`].
fn sampling(parameters: Parameters, model: &ModelLimits, fresh_seed: u64) -> Sampling {
    // NaN is no default: it stays and is refused by the check.
    let penalty = |strength: f32, neutral: &[f32], context: u32| {
        let context = if context == 0 { DEFAULT_PENALTY_CONTEXT } else { context as usize };
        (!neutral.contains(&strength)).then_some(Penalty { strength, context })
    };
    Sampling {
        temperature: parameters.temperature,
        top_p: parameters.top_p,
        min_p: parameters.min_p,
        min_tokens_to_keep: parameters.min_tokens_to_keep.max(1) as usize,
        top_k: parameters.top_k as usize,
        // A threshold out of range is an error even while the probability turns XTC off.
        xtc: (parameters.xtc_probability != 0.0 || parameters.xtc_threshold != 0.0).then(|| Xtc {
            probability: parameters.xtc_probability,
            threshold: parameters.xtc_threshold,
            special_tokens: model.xtc_special_tokens.clone(),
        }),
        seed: parameters.seed.unwrap_or(fresh_seed),
        logit_bias: parameters.logit_bias,
        repetition: penalty(parameters.repetition_penalty, &[0.0, 1.0], parameters.repetition_context_size),
        presence: penalty(parameters.presence_penalty, &[0.0], parameters.presence_context_size),
        frequency: penalty(parameters.frequency_penalty, &[0.0], parameters.frequency_context_size),
        logprobs: parameters.top_logprobs.map(|top| LogprobRequest { top: top as usize }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits() -> ModelLimits {
        ModelLimits {
            vocabulary: 100,
            context_tokens: 300,
            eos_tokens: vec![2, 1],
            xtc_special_tokens: vec![1, 2],
        }
    }

    fn valid(parameters: Parameters) -> Result<ValidRequest, RequestError> {
        ValidRequest::new(vec![5, 6, 7], parameters, &limits(), 42)
    }

    #[test]
    fn zeros_mean_the_defaults() {
        let request = valid(Parameters::default()).unwrap();
        assert_eq!(request.spec.max_tokens, 256);
        assert_eq!(request.spec.stop_tokens, [1, 2]);
        assert_eq!(request.seed(), 42);
        assert_eq!(request.spec.sampling, Sampling { seed: 42, ..Sampling::default() });
        assert!(!request.is_clipped);
    }

    #[test]
    fn the_answer_ends_where_the_context_does() {
        let request = valid(Parameters { max_tokens: 1000, ..Parameters::default() }).unwrap();
        assert_eq!((request.spec.max_tokens, request.is_clipped), (297, true));
        let almost = ValidRequest::new(vec![0; 299], Parameters::default(), &limits(), 0).unwrap();
        assert_eq!((almost.spec.max_tokens, almost.is_clipped), (1, false));
        assert_eq!(
            ValidRequest::new(vec![0; 300], Parameters::default(), &limits(), 0).unwrap_err(),
            RequestError::PromptTooLong { tokens: 300, context: 300 }
        );
    }

    #[test]
    fn a_penalty_needs_a_strength_and_has_a_default_length() {
        let request = valid(Parameters {
            repetition_penalty: 1.3,
            presence_penalty: 0.5,
            presence_context_size: 7,
            ..Parameters::default()
        });
        let sampling = request.unwrap().spec.sampling;
        assert_eq!(sampling.repetition, Some(Penalty { strength: 1.3, context: 20 }));
        assert_eq!(sampling.presence, Some(Penalty { strength: 0.5, context: 7 }));
        assert_eq!(sampling.frequency, None);
        let neutral = valid(Parameters { repetition_penalty: 1.0, ..Parameters::default() }).unwrap();
        assert_eq!(neutral.spec.sampling.repetition, None);
    }

    #[test]
    fn the_models_end_can_be_ignored_but_not_the_requests() {
        let parameters =
            Parameters { ignore_eos: true, extra_stop_tokens: vec![9, 9], ..Parameters::default() };
        assert_eq!(valid(parameters).unwrap().spec.stop_tokens, [9]);
    }

    #[test]
    fn the_wrong_field_is_named() {
        let with = |change: fn(&mut Parameters)| {
            let mut parameters = Parameters::default();
            change(&mut parameters);
            valid(parameters).unwrap_err().to_string()
        };
        let cases = [
            (with(|it| it.temperature = -1.0), "temperature is -1, but must be 0 or more"),
            (with(|it| it.temperature = 1e9), "temperature is 1000000000, but must be between 0 and 100"),
            (with(|it| it.temperature = f32::NAN), "temperature is NaN, but must be 0 or more"),
            (with(|it| it.repetition_penalty = -0.5), "repetition_penalty is -0.5, but must be 0 or more"),
            (
                with(|it| it.presence_penalty = f32::NAN),
                "presence_penalty is NaN, but must be a finite number",
            ),
            (with(|it| it.top_p = 1.1), "top_p is 1.1, but must be between 0 and 1"),
            (with(|it| it.xtc_threshold = 0.7), "xtc_threshold is 0.7, but must be between 0 and 0.5"),
            (
                with(|it| it.top_logprobs = Some(21)),
                "top_logprobs is 21, but must be at most 20 and below the vocabulary size",
            ),
            (with(|it| it.stop = vec!["x".into(); 17]), "stop has 17 entries, but at most 16 are allowed"),
            (with(|it| it.stop = vec![String::new()]), "a stop string has 0 bytes, but must have 1 to 256"),
            (
                with(|it| it.extra_stop_tokens = vec![100]),
                "extra_eos has token 100, but the vocabulary ends at 100",
            ),
            (
                with(|it| it.logit_bias = (0..1025).map(|token| (token, 0.0)).collect()),
                "logit_bias has 1025 entries, but at most 1024 are allowed",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error, text);
        }
        let token = ValidRequest::new(vec![100], Parameters::default(), &limits(), 0).unwrap_err();
        assert_eq!(token, RequestError::Token { field: "prompt", token: 100, vocabulary: 100 });
        let empty = ValidRequest::new(vec![], Parameters::default(), &limits(), 0).unwrap_err();
        assert_eq!(empty, RequestError::EmptyPrompt);
    }

    proptest! {
        #[test]
        fn whatever_passes_the_door_fits_the_model(
            prompt in proptest::collection::vec(0u32..120, 0..400),
            max_tokens in any::<u32>(),
            temperature in any::<f32>(),
            top_p in -0.5f32..1.5,
            top_k in 0u32..120,
            bias in proptest::collection::btree_map(0u32..110, any::<f32>(), 0..4),
            penalty in any::<f32>(),
            top_logprobs in proptest::option::of(0u32..30),
        ) {
            let parameters = Parameters {
                max_tokens, temperature, top_p, top_k, logit_bias: bias, presence_penalty: penalty, top_logprobs,
                ..Parameters::default()
            };
            if let Ok(request) = ValidRequest::new(prompt, parameters, &limits(), 1) {
                prop_assert!(request.spec.max_tokens >= 1);
                prop_assert!(request.prompt.len() + request.spec.max_tokens <= limits().context_tokens);
                prop_assert!(request.prompt.iter().all(|token| *token < 100));
                prop_assert!(request.spec.sampling.check(100).is_ok());
            }
        }
    }
}
