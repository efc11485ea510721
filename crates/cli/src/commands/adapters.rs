//! `mlxnode adapters`: LoRA and DoRA adapters beside the models of the cluster.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::{output, wire};
use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use mlxnode_proto::v1::{ListModelsRequest, LoadAdapterRequest, UnloadAdapterRequest};
use serde_json::json;
use std::path::Path;

/// Load, list and unload adapters of models that are loaded.
///
/// An adapter (LoRA or DoRA, as mlx-lm or PEFT write it) lies beside its model: loading one takes moments, the model goes on working,
/// and one batch serves requests of several adapters. Requests ask for it as the model NAME:ADAPTER. The cluster remembers what is loaded
/// and reads it again after a restart.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode adapters load Qwen3-8B-4bit ~/adapters/poet
  mlxnode generate --model Qwen3-8B-4bit:poet --prompt \"The sea\"
  mlxnode adapters list
  mlxnode adapters unload Qwen3-8B-4bit poet")]
pub struct Adapters {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Load an adapter beside a model. The folder must be on every node that runs a stage of it; an id is downloaded.
    Load {
        /// The model's name, as `mlxnode status` shows it.
        model: String,
        /// A folder, or a Hugging Face id (OWNER/NAME).
        adapter: String,
        /// What requests shall call it. Default: the adapter's name.
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
    },
    /// List the adapters, of one model or of all.
    List {
        /// The model's name.
        model: Option<String>,
    },
    /// Take an adapter off a model. Requests that have it keep it to their end.
    Unload {
        /// The model's name.
        model: String,
        /// The adapter's name.
        adapter: String,
    },
}

impl Adapters {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        match self.action {
            Action::Load { model, adapter, name } => load(&connection, global, model, &adapter, name).await,
            Action::List { model } => list(&connection, global, model.as_deref()).await,
            Action::Unload { model, adapter } => {
                let request = UnloadAdapterRequest { model: model.clone(), name: adapter.clone() };
                connection.models().unload_adapter(request).await?;
                match global.json {
                    true => output::json(&json!({ "model": model, "unloaded": adapter })),
                    false => output::line(&format!("{model}:{adapter} is unloaded.")),
                }
            }
        }
    }
}

async fn load(
    connection: &Connection,
    global: &Global,
    model: String,
    adapter: &str,
    name: Option<String>,
) -> Result<()> {
    let request = LoadAdapterRequest { model, source: source(adapter), name: name.unwrap_or_default() };
    let loaded = connection.models().load_adapter(request).await?.into_inner();
    let deployment = loaded.deployment.context("the node loaded an adapter, but does not say of what")?;
    let id = format!("{}:{}", deployment.name, loaded.name);
    match global.json {
        true => output::json(&json!({ "model": deployment.name, "adapter": loaded.name, "id": id })),
        false => output::line(&format!("Ask for it as the model {id}.")),
    }
}

async fn list(connection: &Connection, global: &Global, model: Option<&str>) -> Result<()> {
    let listing = connection.models().list(ListModelsRequest {}).await?.into_inner();
    let all: Vec<wire::Deployment> = listing.deployments.into_iter().map(wire::deployment).collect();
    let is_asked = |deployment: &&wire::Deployment| model.is_none_or(|model| deployment.model == model);
    // Replicas have the same adapters.
    let asked: Vec<&wire::Deployment> = all.iter().filter(is_asked).filter(|it| it.replica <= 1).collect();
    if let (Some(model), true) = (model, asked.is_empty()) {
        let names: Vec<&str> = all.iter().map(|deployment| deployment.model.as_str()).collect();
        let loaded = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
        bail!("no model named {model:?} is loaded; loaded: {loaded}");
    }
    if global.json {
        let of = |deployment: &&wire::Deployment| {
            let model = deployment.model.clone();
            deployment.adapters.iter().map(move |adapter| {
                let id = format!("{model}:{}", adapter.name);
                json!({ "model": model, "id": id, "name": adapter.name, "source": adapter.source, "problem": adapter.problem })
            }).collect::<Vec<_>>()
        };
        return output::json(&json!({ "adapters": asked.iter().flat_map(of).collect::<Vec<_>>() }));
    }
    let rows: Vec<Vec<String>> = asked
        .iter()
        .flat_map(|deployment| {
            deployment.adapters.iter().map(|adapter| {
                vec![
                    format!("{}:{}", deployment.model, adapter.name),
                    adapter.source.clone(),
                    adapter.problem.clone().unwrap_or_else(|| "ready".to_owned()),
                ]
            })
        })
        .collect();
    if rows.is_empty() {
        return output::line("There is no adapter. `mlxnode adapters load MODEL ADAPTER` loads one.");
    }
    output::table(&["model", "adapter", "state"], &rows)
}

/// A folder is made absolute: other processes read it.
fn source(adapter: &str) -> String {
    let folder = Path::new(adapter);
    match folder.is_dir() {
        true => std::path::absolute(folder).map_or(adapter.to_owned(), |path| path.display().to_string()),
        false => adapter.to_owned(),
    }
}
