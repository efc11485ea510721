//! `/v1/fine_tuning/jobs`: jobs of the cluster as OpenAI's clients submit and watch them.

use super::files::{hash_of, told};
use super::fine_tuning_wire as wire;
use crate::http::body::JsonBody;
use crate::http::fields::Fields;
use crate::http::{ApiError, Caller, ErrorKind, HttpServices, id};
use axum::Json;
use axum::extract::{Path, Query, State};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Largest training file whose rows are counted.
const MAX_ROWS_FILE: u64 = 48 << 20;
/// Jobs of a page.
const PAGE: usize = 20;
const MAX_PAGE: usize = 100;
/// What OpenAI calls "auto".
const AUTO_EPOCHS: u64 = 3;
const AUTO_BATCH: u64 = 4;
/// What the multiplier multiplies: mlx-lm's learning rate.
const LEARNING_RATE: f64 = 1e-5;

/// Submits a job.
pub(in crate::http) async fn create(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let mut fields = body.fields;
    let model = fields.needed_string("model")?;
    let training = hash_of(&fields.needed_string("training_file")?, "training_file")?;
    let validation = fields.string("validation_file")?;
    let validation = validation.map(|id| hash_of(&id, "validation_file")).transpose()?;
    let suffix = fields.string("suffix")?;
    let seed = fields.integer("seed", 0..=i64::from(u32::MAX))?.unwrap_or(0);
    let metadata = fields.map("metadata")?;
    let own = fields.map("configuration")?.unwrap_or_default();
    fields.refuse("integrations", "figures are at /events and in `mlxnode jobs show`")?;
    let mut hyperparameters = fields.object("hyperparameters")?;
    if let Some(mut method) = fields.object("method")? {
        method.only("type", &["supervised".into()], "dpo is chosen by `configuration`")?;
        if let Some(mut supervised) = method.object("supervised")? {
            hyperparameters = supervised.object("hyperparameters")?.or(hyperparameters);
            supervised.finish()?;
        }
        method.finish()?;
    }
    let mut chosen = Chosen { epochs: AUTO_EPOCHS, batch: AUTO_BATCH, multiplier: 1.0 };
    if let Some(hyperparameters) = hyperparameters {
        chosen.read(hyperparameters)?;
    }
    fields.finish()?;

    let service = services.jobs_service()?;
    let content = service.files().read(training, MAX_ROWS_FILE).await.map_err(told)?;
    let rows = content.split(|byte| *byte == b'\n').filter(|row| !row.is_empty()).count() as u64;
    if rows == 0 {
        return Err(ApiError::field("training_file", "the file has no rows"));
    }
    // A deployment's name, or whatever a load takes.
    let deployments = services.front.deployments();
    let served = deployments.iter().find(|deployment| deployment.name == model);
    let job = id("ftjob-");
    let adapter = suffix.unwrap_or_else(|| job.clone());
    let wish = wire::Wish {
        source: served.map_or_else(|| model.clone(), |deployment| deployment.source.clone()),
        publish: served.map(|deployment| (deployment.name.clone(), adapter)),
        configuration: configuration(&chosen, rows, seed, metadata, own),
        training: (training, content.len() as u64),
        validation: match validation {
            Some(hash) => {
                let content = service.files().read(hash, MAX_ROWS_FILE).await.map_err(told)?;
                Some((hash, content.len() as u64))
            }
            None => None,
        },
        id: job,
    };
    Ok(Json(wire::submit(service, &caller, wish).await?))
}

struct Chosen {
    epochs: u64,
    batch: u64,
    multiplier: f64,
}

impl Chosen {
    /// Numbers, or "auto".
    fn read(&mut self, mut fields: Fields) -> Result<(), ApiError> {
        let whole = |fields: &mut Fields, name: &str, most: u64, usual: u64| match fields.value(name) {
            None => Ok(usual),
            Some(Value::String(text)) if text == "auto" => Ok(usual),
            Some(Value::Number(number)) if number.as_u64().is_some_and(|it| (1..=most).contains(&it)) => {
                Ok(number.as_u64().unwrap_or(usual))
            }
            Some(_) => Err(ApiError::field(
                fields.path(name),
                format!("{} must be \"auto\" or 1 to {most}", fields.path(name)),
            )),
        };
        self.epochs = whole(&mut fields, "n_epochs", 1000, self.epochs)?;
        self.batch = whole(&mut fields, "batch_size", 256, self.batch)?;
        self.multiplier = match fields.value("learning_rate_multiplier") {
            None => self.multiplier,
            Some(Value::String(text)) if text == "auto" => self.multiplier,
            Some(Value::Number(number)) if number.as_f64().is_some_and(|it| it > 0.0 && it <= 1e6) => {
                number.as_f64().unwrap_or(self.multiplier)
            }
            Some(_) => {
                let path = fields.path("learning_rate_multiplier");
                return Err(ApiError::field(path.clone(), format!("{path} must be \"auto\" or above 0")));
            }
        };
        fields.finish()
    }
}

/// YAML with mlx-lm's keys; `own` are such keys, and win. The first line is ours, for whoever asks what was asked.
fn configuration(
    chosen: &Chosen,
    rows: u64,
    seed: i64,
    metadata: Option<Map<String, Value>>,
    own: Map<String, Value>,
) -> String {
    let batch = chosen.batch.min(rows);
    let mut keys = Map::from_iter([
        ("iters".to_owned(), json!((rows * chosen.epochs).div_ceil(batch))),
        ("batch_size".to_owned(), json!(batch)),
        ("learning_rate".to_owned(), json!(LEARNING_RATE * chosen.multiplier)),
        ("seed".to_owned(), json!(seed)),
    ]);
    keys.extend(own);
    let asked = json!({
        "hyperparameters": {
            "n_epochs": chosen.epochs, "batch_size": chosen.batch,
            "learning_rate_multiplier": chosen.multiplier,
        },
        "seed": seed, "metadata": metadata,
    });
    let lines = keys.iter().map(|(key, value)| format!("{key}: {value}\n"));
    format!("{}{asked}\n{}", wire::ASKED, lines.collect::<String>())
}

/// All jobs, by pages.
pub(in crate::http) async fn list(
    State(services): State<HttpServices>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Json<Value>, ApiError> {
    let jobs = wire::list(services.jobs_service()?).await?;
    page(jobs, &query)
}

fn page(all: Vec<Value>, query: &BTreeMap<String, String>) -> Result<Json<Value>, ApiError> {
    let limit = match query.get("limit").map(|limit| limit.parse::<usize>()) {
        None => PAGE,
        Some(Ok(limit)) if (1..=MAX_PAGE).contains(&limit) => limit,
        Some(_) => return Err(ApiError::field("limit", format!("limit must be 1 to {MAX_PAGE}"))),
    };
    let begin = match query.get("after") {
        None => 0,
        Some(after) => all.iter().position(|entry| entry["id"] == after.as_str()).map_or(all.len(), |at| at + 1),
    };
    let rest = all.len().saturating_sub(begin);
    let data: Vec<Value> = all.into_iter().skip(begin).take(limit).collect();
    Ok(Json(json!({"object": "list", "has_more": rest > data.len(), "data": data})))
}

/// One job.
pub(in crate::http) async fn one(
    State(services): State<HttpServices>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(wire::get(services.jobs_service()?, id).await?))
}

/// Cancels, pauses or resumes a job.
pub(in crate::http) async fn change(
    State(services): State<HttpServices>,
    caller: Caller,
    Path((id, change)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let service = services.jobs_service()?;
    let change = match change.as_str() {
        "cancel" => wire::Change::Cancel,
        "pause" => wire::Change::Pause,
        "resume" => wire::Change::Resume,
        _ => return Err(ApiError::new(ErrorKind::NoRoute, "a job can be told to cancel, pause or resume")),
    };
    Ok(Json(wire::change(service, &caller, id, change).await?))
}

/// What happened to a job, the newest first, or its checkpoints.
pub(in crate::http) async fn about(
    State(services): State<HttpServices>,
    Path((id, what)): Path<(String, String)>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Json<Value>, ApiError> {
    let service = services.jobs_service()?;
    match what.as_str() {
        "events" => page(wire::events(service, id).await?, &query),
        "checkpoints" => page(wire::checkpoints(service, id).await?, &query),
        _ => Err(ApiError::new(ErrorKind::NoRoute, "a job has events and checkpoints")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_become_iterations_and_own_keys_win() {
        let chosen = Chosen { epochs: 3, batch: 4, multiplier: 2.0 };
        let own = Map::from_iter([("num_layers".to_owned(), json!(2)), ("seed".to_owned(), json!(9))]);
        let text = configuration(&chosen, 10, 7, None, own);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("# "), "{text}");
        assert_eq!(lines[1..], ["iters: 8", "batch_size: 4", "learning_rate: 0.00002", "seed: 9", "num_layers: 2"]);
        assert!(configuration(&chosen, 2, 7, None, Map::new()).contains("batch_size: 2"), "no more than there are");
    }

    #[test]
    fn pages_go_on_after_the_last() {
        let all: Vec<Value> = (0..5).map(|number| json!({"id": number.to_string()})).collect();
        let ask = |words: &[(&str, &str)]| {
            let query = words.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            page(all.clone(), &query).map(|Json(page)| page)
        };
        let first = ask(&[("limit", "2")]).unwrap();
        assert_eq!((&first["has_more"], &first["data"][1]["id"]), (&json!(true), &json!("1")));
        let last = ask(&[("limit", "3"), ("after", "1")]).unwrap();
        assert_eq!((&last["has_more"], &last["data"][2]["id"]), (&json!(false), &json!("4")));
        assert!(ask(&[("limit", "0")]).is_err() && ask(&[("limit", "x")]).is_err());
    }
}
