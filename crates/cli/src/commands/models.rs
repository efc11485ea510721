//! `mlxnode models`: what can be run here without a download.

use crate::arguments::Global;
use crate::{hub, output};
use anyhow::Result;
use clap::Args;
use mlxnode_checkpoint::{Config, architectures};
use mlxnode_compute::ByteCount;
use mlxnode_hub::Hub;
use serde::Serialize;
use std::path::Path;

/// A config.json beyond this is not one.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// List the models on this Mac.
///
/// These are the ones in Hugging Face's cache, which Python's tools share; the demo model is built in. `mlxnode status` shows what the
/// cluster has loaded.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode models
  mlxnode models --json | jq -r '.models[].model'")]
pub struct Models {}

/// What `--json` prints.
#[derive(Serialize)]
struct Facts {
    models: Vec<ModelFacts>,
    architectures: Vec<&'static str>,
}

#[derive(Serialize)]
struct ModelFacts {
    model: String,
    /// `null` when its config.json does not say.
    architecture: Option<String>,
    /// Whether this program knows the architecture.
    supported: bool,
    bytes: u64,
    folder: String,
}

impl Models {
    pub fn run(self, global: &Global) -> Result<()> {
        let facts = Facts {
            models: Hub::new(hub::options())
                .local_models()
                .into_iter()
                .map(|model| {
                    let config = config(&model.folder);
                    ModelFacts {
                        model: model.source.to_string(),
                        architecture: config
                            .as_ref()
                            .and_then(|config| config.model_type().ok().map(str::to_owned)),
                        supported: config.is_some_and(|config| architectures::spec(&config).is_ok()),
                        bytes: model.bytes,
                        folder: model.folder.display().to_string(),
                    }
                })
                .collect(),
            architectures: architectures::known()
                .iter()
                .flat_map(|known| [known.name].into_iter().chain(known.aliases.iter().copied()))
                .collect(),
        };
        if global.json {
            return output::json(&facts);
        }
        let rows: Vec<Vec<String>> = facts
            .models
            .iter()
            .map(|model| {
                let architecture = model.architecture.as_deref().unwrap_or("unknown");
                let known = if model.supported { "" } else { " (not supported)" };
                vec![
                    model.model.clone(),
                    format!("{architecture}{known}"),
                    ByteCount(model.bytes).to_string(),
                ]
            })
            .collect();
        match rows.is_empty() {
            true => output::line("Nothing was downloaded yet; the model \"demo\" is built in.")?,
            false => output::table(&["model", "architecture", "size"], &rows)?,
        }
        output::line(&format!("\nArchitectures: {}", facts.architectures.join(", ")))
    }
}

/// The model's config.json, if it is sound.
fn config(folder: &Path) -> Option<Config> {
    let path = folder.join("config.json");
    let size = path.metadata().ok()?.len();
    if size > MAX_CONFIG_BYTES {
        return None;
    }
    Config::from_json(&std::fs::read(path).ok()?).ok()
}
