//! The fields about sampling that chat and text completions share, mlx_lm.server's and vLLM's additions included.

use crate::front::SamplingDefaults;
use crate::http::ApiError;
use crate::http::fields::{Fields, wrong};
use mlxnode_coordinator::requests::{
    MAX_LOGIT_BIASES, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKENS, MAX_TEMPERATURE, Parameters,
};
use std::collections::BTreeMap;

/// Most samples of one prompt.
const MAX_SAMPLES: i64 = 16;
/// OpenAI's temperature and top_p, where neither the request nor the model's authors say otherwise.
const OPENAI_DEFAULT: f32 = 1.0;

/// Everything about sampling but the number of tokens and the log-probabilities, which differ between the endpoints.
pub(in crate::http) fn parameters(
    fields: &mut Fields,
    defaults: &SamplingDefaults,
) -> Result<Parameters, ApiError> {
    let temperature = fields.number("temperature", 0.0..=MAX_TEMPERATURE)?.or(defaults.temperature);
    let top_p = fields.number("top_p", 0.0..=1.0)?.or(defaults.top_p);
    let repetition =
        fields.number("repetition_penalty", 0.0..=MAX_TEMPERATURE)?.or(defaults.repetition_penalty);
    Ok(Parameters {
        temperature: temperature.unwrap_or(OPENAI_DEFAULT),
        top_p: top_p.unwrap_or(OPENAI_DEFAULT),
        top_k: fields.count("top_k")?.or(defaults.top_k).unwrap_or_default(),
        min_p: fields.number("min_p", 0.0..=1.0)?.or(defaults.min_p).unwrap_or_default(),
        min_tokens_to_keep: fields.count("min_tokens_to_keep")?.unwrap_or_default(),
        xtc_probability: fields.number("xtc_probability", 0.0..=1.0)?.unwrap_or_default(),
        xtc_threshold: fields.number("xtc_threshold", 0.0..=0.5)?.unwrap_or_default(),
        // Negative seeds are seeds too: their bits.
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
        logit_bias: logit_bias(fields)?,
        repetition_penalty: repetition.unwrap_or_default(),
        repetition_context_size: fields.count("repetition_context_size")?.unwrap_or_default(),
        presence_penalty: fields.number("presence_penalty", -100.0..=100.0)?.unwrap_or_default(),
        presence_context_size: fields.count("presence_context_size")?.unwrap_or_default(),
        frequency_penalty: fields.number("frequency_penalty", -100.0..=100.0)?.unwrap_or_default(),
        frequency_context_size: fields.count("frequency_context_size")?.unwrap_or_default(),
        stop: stop_texts(fields.strings("stop", MAX_STOP_STRINGS)?, "stop")?,
        extra_stop_tokens: stop_tokens(fields)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or_default(),
        adapter: fields.string("adapters")?,
        draft_model: fields.string("draft_model")?,
        num_draft_tokens: fields.count("num_draft_tokens")?,
        ..Parameters::default()
    })
}

/// How many samples.
pub(in crate::http) fn samples(fields: &mut Fields) -> Result<usize, ApiError> {
    let samples = fields.integer("n", 1..=MAX_SAMPLES)?.unwrap_or(1);
    Ok(usize::try_from(samples).unwrap_or(1))
}

/// Fields that OpenAI's clients send and that change nothing on a machine of one's own.
pub(in crate::http) fn without_effect(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"] {
        fields.without_effect(name);
    }
    fields.only("store", &[false.into()], "answers are not stored")?;
    let tiers = ["auto", "default"].map(Into::into);
    fields.only("service_tier", &tiers, "there is one tier")
}

fn logit_bias(fields: &mut Fields) -> Result<BTreeMap<u32, f32>, ApiError> {
    let path = fields.path("logit_bias");
    let Some(map) = fields.map("logit_bias")? else { return Ok(BTreeMap::new()) };
    if map.len() > MAX_LOGIT_BIASES {
        let message = format!("{path} has {} entries, but at most {MAX_LOGIT_BIASES} are allowed", map.len());
        return Err(ApiError::field(path, message));
    }
    let mut biases = BTreeMap::new();
    for (token, bias) in map {
        let shown = crate::http::fields::shortened(&token);
        let Ok(id) = token.parse::<u32>() else {
            return Err(ApiError::field(path, format!("logit_bias has {shown:?}, which is no token id")));
        };
        match bias.as_f64() {
            Some(number) if (-1000.0..=1000.0).contains(&number) => biases.insert(id, number as f32),
            Some(number) => {
                let message = format!("logit_bias[{id}] is {number}, but must be between -1000 and 1000");
                return Err(ApiError::field(path, message));
            }
            None => return Err(wrong(&format!("{path}[{id}]"), &bias, "a number")),
        };
    }
    Ok(biases)
}

/// Texts that end an answer, checked.
pub(in crate::http) fn stop_texts(texts: Vec<String>, field: &str) -> Result<Vec<String>, ApiError> {
    match texts.iter().find(|text| text.is_empty() || text.len() > MAX_STOP_BYTES) {
        None => Ok(texts),
        Some(text) => {
            let message =
                format!("{field} has a text of {} bytes, but must have 1 to {MAX_STOP_BYTES}", text.len());
            Err(ApiError::field(field, message))
        }
    }
}

fn stop_tokens(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let path = fields.path("stop_token_ids");
    let list = fields.list("stop_token_ids", MAX_STOP_TOKENS)?.unwrap_or_default();
    list.iter().enumerate().map(|(index, value)| token(value, &format!("{path}[{index}]"))).collect()
}

/// A token id.
pub(in crate::http) fn token(value: &serde_json::Value, path: &str) -> Result<u32, ApiError> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| wrong(path, value, "a token id"))
}
