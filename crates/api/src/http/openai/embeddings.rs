//! `/v1/embeddings`: the mean of a text's hidden vectors behind the model's last norm, as it is (not of length 1).

use super::completions::prompts;
use super::sampling::without_effect;
use super::usage::EmbeddingUsage;
use crate::front::EmbeddingRequest;
use crate::http::body::JsonBody;
use crate::http::{ApiError, Caller, HttpServices};
use axum::Json;
use axum::extract::State;
use data_encoding::BASE64;
use futures::StreamExt as _;
use futures::stream;
use serde::Serialize;

/// Texts of one request that run at the same time; the scheduler would queue more of them anyway.
const AT_ONCE: usize = 8;

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
    let adapter = fields.string("adapters")?.or(model.adapter);
    without_effect(&mut fields)?;
    fields.finish()?;
    let embed = |input| {
        let request = EmbeddingRequest {
            model: model.deployment.name.clone(),
            input,
            adapter: adapter.clone(),
            deadline: None,
            tenant: caller.tenant.clone(),
            trace: caller.trace,
        };
        services.front.embed(request)
    };
    let mut running = stream::iter(inputs).map(embed).buffered(AT_ONCE);
    let (mut data, mut tokens) = (Vec::new(), 0);
    while let Some(embedded) = running.next().await {
        let (values, prompt_tokens) = embedded?;
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
