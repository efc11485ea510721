//! How the next token is chosen, as data. The engine carries it out; [`Sampling::check`] makes it impossible to get wrong.

use std::collections::BTreeMap;

/// Parameters of the sampler chain: penalties, then top-p, min-p, XTC, top-k, then the temperature (the order of mlx-lm).
///
/// Sampling is a pure function of (logits, these parameters, index of the generated token): the random key of the n-th
/// token is derived from `seed` and n alone, so that a sequence can be continued anywhere.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: greedy, and every filter is ignored.
    pub temperature: f32,
    /// Nucleus; off at 0 and at 1.
    pub top_p: f32,
    /// Relative floor; off at 0.
    pub min_p: f32,
    /// Tokens that min_p always leaves.
    pub min_tokens_to_keep: usize,
    /// Off at 0.
    pub top_k: usize,
    /// Exclude top choices; `None` is off.
    pub xtc: Option<Xtc>,
    /// Start of the random keys.
    pub seed: u64,
    /// Added to logits, by token.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Multiplicative penalty (1.0 changes nothing).
    pub repetition: Option<Penalty>,
    /// Subtractive, once per distinct token.
    pub presence: Option<Penalty>,
    /// Subtractive, per occurrence.
    pub frequency: Option<Penalty>,
    /// Ask for log-probabilities.
    pub logprobs: Option<LogprobRequest>,
}

/// XTC: with `probability`, drop all tokens likelier than `threshold` but the least likely of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Xtc {
    /// 0 to 1.
    pub probability: f32,
    /// 0 to 0.5.
    pub threshold: f32,
    /// Tokens that are never dropped (newline, end of sequence).
    pub special_tokens: Vec<u32>,
}

/// A penalty over the last `context` tokens (prompt included).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalty {
    /// Strength.
    pub strength: f32,
    /// How many of the last tokens count.
    pub context: usize,
}

/// Which log-probabilities to report: the chosen token's, and those of the `top` most likely ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogprobRequest {
    /// 0 to 20.
    pub top: usize,
}

/// A token that the last stage chose.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Natural logarithm of its probability, after the penalties and before filters and temperature, when asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first, when asked for.
    pub top: Vec<Candidate>,
}

/// A token and its log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

impl Default for Sampling {
    /// Greedy, nothing else.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 0.0,
            min_p: 0.0,
            min_tokens_to_keep: 1,
            top_k: 0,
            xtc: None,
            seed: 0,
            logit_bias: BTreeMap::new(),
            repetition: None,
            presence: None,
            frequency: None,
            logprobs: None,
        }
    }
}

/// A parameter out of its range. Names the parameter as the command line and the API spell it.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("{parameter} is {value}, but must be {allowed}")]
pub struct SamplingError {
    /// Its name.
    pub parameter: &'static str,
    /// What was given.
    pub value: String,
    /// What would do.
    pub allowed: String,
}

impl LogprobRequest {
    /// Checks the number of candidates against a vocabulary of `vocabulary` tokens; `parameter` is how the request spells it.
    ///
    /// # Errors
    /// When it is out of its range.
    pub fn check(&self, parameter: &'static str, vocabulary: usize) -> Result<(), SamplingError> {
        if self.top <= 20 && self.top < vocabulary {
            return Ok(());
        }
        let allowed = "at most 20 and below the vocabulary size".to_owned();
        Err(SamplingError { parameter, value: self.top.to_string(), allowed })
    }
}

impl Sampling {
    /// Checks every range against a vocabulary of `vocabulary` tokens.
    pub fn check(&self, vocabulary: usize) -> Result<(), SamplingError> {
        let refuse = |parameter, value: &dyn std::fmt::Display, allowed: &str| {
            Err(SamplingError { parameter, value: value.to_string(), allowed: allowed.to_owned() })
        };
        let within = |value: f32, low: f32, high: f32| value >= low && value <= high; // false for NaN
        if !within(self.temperature, 0.0, f32::MAX) {
            return refuse("temperature", &self.temperature, "0 or more");
        }
        if !within(self.top_p, 0.0, 1.0) {
            return refuse("top_p", &self.top_p, "between 0 and 1");
        }
        if !within(self.min_p, 0.0, 1.0) {
            return refuse("min_p", &self.min_p, "between 0 and 1");
        }
        if self.min_tokens_to_keep == 0 {
            return refuse("min_tokens_to_keep", &0, "1 or more");
        }
        if self.top_k >= vocabulary {
            return refuse(
                "top_k",
                &self.top_k,
                &format!("below the vocabulary size of {vocabulary} (0 turns it off)"),
            );
        }
        if let Some(xtc) = &self.xtc {
            if !within(xtc.probability, 0.0, 1.0) {
                return refuse("xtc_probability", &xtc.probability, "between 0 and 1");
            }
            if !within(xtc.threshold, 0.0, 0.5) {
                return refuse("xtc_threshold", &xtc.threshold, "between 0 and 0.5");
            }
        }
        for (token, bias) in &self.logit_bias {
            if *token as usize >= vocabulary {
                return refuse(
                    "logit_bias",
                    token,
                    &format!("for tokens below the vocabulary size of {vocabulary}"),
                );
            }
            if !bias.is_finite() {
                return refuse("logit_bias", bias, "a finite number");
            }
        }
        if let Some(penalty) = self.repetition
            && !within(penalty.strength, 0.0, f32::MAX)
        {
            return refuse("repetition_penalty", &penalty.strength, "0 or more");
        }
        for (name, penalty) in [("presence_penalty", self.presence), ("frequency_penalty", self.frequency)] {
            if let Some(penalty) = penalty
                && !penalty.strength.is_finite()
            {
                return refuse(name, &penalty.strength, "a finite number");
            }
        }
        match self.logprobs {
            Some(request) => request.check("top_logprobs", vocabulary),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_parameter_that_is_out_of_range() {
        let cases: [(&str, Sampling); 5] = [
            ("temperature", Sampling { temperature: f32::NAN, ..Sampling::default() }),
            ("top_p", Sampling { top_p: 1.5, ..Sampling::default() }),
            ("top_k", Sampling { top_k: 10, ..Sampling::default() }),
            ("logit_bias", Sampling { logit_bias: [(10, 1.0)].into(), ..Sampling::default() }),
            ("top_logprobs", Sampling { logprobs: Some(LogprobRequest { top: 21 }), ..Sampling::default() }),
        ];
        for (parameter, sampling) in cases {
            assert_eq!(sampling.check(10).expect_err("out of range").parameter, parameter);
        }
        assert_eq!(Sampling::default().check(10), Ok(()));
    }
}
