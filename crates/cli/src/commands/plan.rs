//! `mlxnode plan MODEL`: where the layers would go, or why it does not fit.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::guessing::{GuessFlags, Guesses};
use crate::output;
use anyhow::Result;
use clap::Args;
use mlxnode_compute::ByteCount;
use mlxnode_proto::v1::{Guessing, PlanRequest};

/// Show where a model's layers would go, or why it does not fit.
///
/// Reads the model's true sizes and every node's free budget; nothing is loaded.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode plan mlx-community/Llama-3.3-70B-Instruct-4bit
  mlxnode plan ~/models/qwen3 --stages 2 --context 16384")]
pub struct Plan {
    #[command(flatten)]
    pub wish: Wish,
}

/// What `plan` and `load` both take.
#[derive(Clone, Debug, Args)]
pub struct Wish {
    /// A folder, a Hugging Face id (OWNER/NAME), or "demo".
    pub model: String,
    /// Split the layers over this many nodes instead of as few as fit.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    stages: Option<u32>,
    /// Use only this node (name or id); repeat for several.
    #[arg(long = "node", value_name = "NODE")]
    nodes: Vec<String>,
    /// Tokens of context to reserve memory for, for each sequence. Default: what the model allows, at most 4096.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Sequences of that length to reserve memory for. Default: 4. Shorter ones share it, up to four times as many at the same time.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    sequences: Option<u32>,
    #[command(flatten, next_help_heading = "Speed")]
    guess: GuessFlags,
}

impl Wish {
    /// As the API takes it. A folder is made absolute: other processes read it.
    pub fn request(&self) -> PlanRequest {
        PlanRequest {
            model: absolute(&self.model),
            stages: self.stages.unwrap_or_default(),
            nodes: self.nodes.clone(),
            context_tokens: self.context.unwrap_or_default(),
            concurrent_sequences: self.sequences.unwrap_or_default(),
            guessing: self.guessing(),
        }
    }
}

/// A folder's whole path; other sources as they are.
fn absolute(source: &str) -> String {
    let folder = std::path::Path::new(source);
    let path = if folder.is_dir() { std::path::absolute(folder).ok() } else { None };
    path.map_or(source.to_owned(), |path| path.display().to_string())
}

impl Wish {
    fn guessing(&self) -> Option<Guessing> {
        match self.guess.guesses() {
            Guesses::Never => None,
            Guesses::Draft { model, tokens } => Some(Guessing {
                draft_model: absolute(&model),
                num_draft_tokens: tokens as u32,
                ..Guessing::default()
            }),
            Guesses::Lookup { ngram, tokens } => Some(Guessing {
                prompt_lookup: ngram as u32,
                num_draft_tokens: tokens as u32,
                ..Guessing::default()
            }),
        }
    }
}

impl Plan {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        let plan = mlxnode_api::picture::Plan::from(
            connection.models().plan(self.wish.request()).await?.into_inner(),
        );
        if global.json {
            return output::json(&plan);
        }
        if plan.fits {
            let rows: Vec<Vec<String>> = plan
                .stages
                .iter()
                .map(|stage| {
                    vec![
                        stage.node.clone(),
                        format!("{}..{}", stage.layer_start, stage.layer_end),
                        ByteCount(stage.weight_bytes).to_string(),
                        ByteCount(stage.kv_bytes).to_string(),
                    ]
                })
                .collect();
            output::table(&["node", "layers", "weights", "KV cache"], &rows)?;
            output::line("")?;
        }
        output::line(&plan.explanation)
    }
}
