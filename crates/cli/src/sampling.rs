//! The flags that say how tokens are chosen. Names and defaults are mlx-lm's.

use clap::Args;
use mlxnode_compute::{LogprobRequest, Penalty, Sampling, Xtc};
use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};

/// How tokens are chosen.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// Temperature. 0: always the most likely token, and the filters below do nothing.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temp: f32,
    /// Keep the most likely tokens whose probabilities add up to this.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Drop tokens less likely than this times the most likely one.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Keep this many tokens. 0: all.
    #[arg(long, value_name = "K", default_value_t = 0, allow_negative_numbers = true)]
    top_k: usize,
    /// Tokens that --min-p always leaves.
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    min_tokens_to_keep: usize,
    /// With this probability, drop all tokens above --xtc-threshold but the least likely of them.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    xtc_probability: f32,
    /// See --xtc-probability.
    #[arg(long, value_name = "P", default_value_t = 0.1, allow_negative_numbers = true)]
    xtc_threshold: f32,
    /// The same seed, prompt and flags give the same answer. Default: another one each time.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<u64>,
    /// Added to the logits of tokens: a JSON object of token ids and numbers, such as '{"13": -5.0}'.
    #[arg(long, value_name = "JSON", value_parser = logit_bias)]
    logit_bias: Option<Biases>,
    /// Divide the logits of tokens that appeared lately by this.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// How many of the last tokens count for --repetition-penalty. 0: all.
    #[arg(long, value_name = "N", default_value_t = 20, allow_negative_numbers = true)]
    repetition_context_size: usize,
    /// Take this off the logits of tokens that appeared lately.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// How many of the last tokens count for --presence-penalty. 0: all.
    #[arg(long, value_name = "N", default_value_t = 20, allow_negative_numbers = true)]
    presence_context_size: usize,
    /// Take this off the logits of tokens for each time they appeared lately.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// How many of the last tokens count for --frequency-penalty. 0: all.
    #[arg(long, value_name = "N", default_value_t = 20, allow_negative_numbers = true)]
    frequency_context_size: usize,
}

/// What is added to which token's logit.
type Biases = BTreeMap<u32, f32>;

impl SamplingFlags {
    /// The same as data. Without `--seed`, `default_seed` or one that nobody knows.
    pub fn sampling(&self, default_seed: Option<u64>, logprobs: Option<usize>) -> Sampling {
        let xtc = Xtc {
            probability: self.xtc_probability,
            threshold: self.xtc_threshold,
            special_tokens: Vec::new(), // filled in where the tokenizer is
        };
        // As in mlx-lm, a penalty of 0 is none. A context of 0 is no limit, which the engine knows.
        let penalty = |strength: Option<f32>, context: usize| {
            strength.filter(|strength| *strength != 0.0).map(|strength| Penalty { strength, context })
        };
        Sampling {
            temperature: self.temp,
            top_p: self.top_p,
            min_p: self.min_p,
            min_tokens_to_keep: self.min_tokens_to_keep,
            top_k: self.top_k,
            xtc: (self.xtc_probability != 0.0).then_some(xtc),
            seed: self.seed.or(default_seed).unwrap_or_else(fresh_seed),
            logit_bias: self.logit_bias.clone().unwrap_or_default(),
            repetition: penalty(self.repetition_penalty, self.repetition_context_size),
            presence: penalty(self.presence_penalty, self.presence_context_size),
            frequency: penalty(self.frequency_penalty, self.frequency_context_size),
            logprobs: logprobs.map(|top| LogprobRequest { top }),
        }
    }
}

/// Random enough for a seed: the standard library's hasher keys come from the system.
fn fresh_seed() -> u64 {
    RandomState::new().hash_one("seed") >> 1
}

fn logit_bias(text: &str) -> Result<Biases, String> {
    serde_json::from_str::<BTreeMap<String, f32>>(text)
        .map_err(|error| format!("not a JSON object of token ids and numbers: {error}"))?
        .into_iter()
        .map(|(token, bias)| {
            let token = token.trim().parse().map_err(|_| format!("{token:?} is not a token id"))?;
            Ok((token, bias))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        sampling: SamplingFlags,
    }

    fn parse(flags: &str) -> Sampling {
        let words = ["x"].into_iter().chain(flags.split_whitespace());
        Flags::try_parse_from(words)
            .unwrap_or_else(|error| panic!("{error}"))
            .sampling
            .sampling(Some(3), None)
    }

    #[test]
    fn without_flags_it_is_greedy() {
        assert_eq!(parse(""), Sampling { top_p: 1.0, seed: 3, ..Sampling::default() });
    }

    #[test]
    fn penalties_of_zero_are_none() {
        let sampling = parse("--repetition-penalty 0 --presence-penalty -0.5 --presence-context-size 0");
        assert_eq!(sampling.repetition, None);
        assert_eq!(sampling.presence, Some(Penalty { strength: -0.5, context: 0 }));
    }

    #[test]
    fn biases_are_by_token_id() {
        assert_eq!(logit_bias(r#"{"7": -1.5, "9": 2}"#), Ok(BTreeMap::from([(7, -1.5), (9, 2.0)])));
        for wrong in ["", "[]", "{\"a\": 1}", "{\"-1\": 1}", "{\"1\": \"x\"}"] {
            assert!(logit_bias(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn seeds_differ_unless_they_are_given() {
        assert_ne!(fresh_seed(), fresh_seed());
        assert_eq!(parse("--seed 9").seed, 9);
    }
}
