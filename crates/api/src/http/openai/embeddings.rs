//! `/v1/embeddings`: the mean of a text's hidden vectors behind the model's last norm, as it is (not of length 1).

use super::completions::prompts;
use super::sampling::without_effect;
use super::usage::EmbeddingUsage;
use crate::conversation::embed;
use crate::http::body::JsonBody;
use crate::http::{ApiError, Caller, HttpServices};
use axum::Json;
use axum::extract::State;
use data_encoding::BASE64;
use serde::Serialize;

/// The answer.
#[derive(Serialize)]
pub(in crate::http) struct Embeddings {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    /// Little-endian 32-bit numbers.
    Base64(String),
}

/// The handler.
pub(in crate::http) async fn embeddings(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Embeddings>, ApiError> {
    let mut fields = body.fields;
    let name = fields.string("model")?.unwrap_or_default();
    let model = services.model(&caller, &name).await?;
    let inputs = prompts(&mut fields, "input")?;
    let is_base64 = fields.one_of("encoding_format", &["float", "base64"])? == Some("base64");
    fields.refuse("dimensions", "vectors are as wide as the model")?;
    let adapter = fields.string("adapters")?;
    without_effect(&mut fields)?;
    fields.finish()?;
    let embedded = embed(&services.front, &caller, &model, inputs, adapter, None).await?;
    let (mut data, mut tokens) = (Vec::new(), 0);
    for (values, prompt_tokens) in embedded {
        tokens += prompt_tokens;
        let embedding = match is_base64 {
            false => Vector::Numbers(values),
            true => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                Vector::Base64(BASE64.encode(&bytes))
            }
        };
        data.push(Embedding { object: "embedding", index: data.len(), embedding });
    }
    let usage = EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens };
    Ok(Json(Embeddings { object: "list", data, model: model.deployment.name.clone(), usage }))
}
