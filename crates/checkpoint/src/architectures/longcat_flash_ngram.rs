//! LongCat Flash with embeddings of groups of tokens.

use super::{Architecture, dense, longcat_flash};
use crate::config::{Config, ConfigError};
use crate::spec::{ModelSpec, NgramsSpec};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("longcat_flash_ngram", spec)
    .weights(weights)
    .names(&[("model.ngram_embeddings.word_embeddings", "model.embed_tokens")]);

/// Tables have fewer rows than this: MLX counts them in 32 bits.
const MOST_ROWS: usize = 1 << 30;

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("ngram_vocab_size_ratio", 78.0),
        ("emb_neighbor_num", 4.0),
        ("emb_split_num", 4.0),
    ]);
    let mut filled = config.with("attention_method", "MLA".into());
    for (field, value) in [("zero_expert_type", "identity".into()), ("attention_bias", false.into())] {
        if config.get(field).is_none() {
            filled = filled.with(field, value);
        }
    }
    let mut model = longcat_flash::spec(&filled)?;
    model.architecture = "longcat_flash_ngram";
    let ratio = config.usize("ngram_vocab_size_ratio", 1..=1 << 20)?;
    let rows = ratio * model.vocabulary;
    if rows >= MOST_ROWS {
        let allowed = format!("below {} for {} tokens", MOST_ROWS / model.vocabulary + 1, model.vocabulary);
        return Err(config.refuse("ngram_vocab_size_ratio", &ratio.to_string(), &allowed));
    }
    let ngrams = NgramsSpec {
        rows,
        longest: config.usize("emb_neighbor_num", 2..=64)?,
        splits: config.usize("emb_split_num", dense::LAYERS)?,
    };
    if ngrams.tables() > model.hidden {
        let allowed = format!("so few that each table gets a part of hidden_size, which is {}", model.hidden);
        return Err(config.refuse("emb_split_num", &ngrams.splits.to_string(), &allowed));
    }
    model.ngrams = Some(ngrams);
    Ok(model)
}

/// As in the model without groups; Hugging Face calls the embedding as most families do.
fn weights(config: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    longcat_flash::weights(config, spec, weights)
}
