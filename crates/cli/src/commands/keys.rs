//! `mlxnode keys`: who may use the cluster over HTTP.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::{output, wire};
use anyhow::{Context as _, Result};
use clap::{Args, Subcommand, ValueEnum};
use mlxnode_proto::v1::{ApiKey, CreateKeyRequest, KeyRole, ListKeysRequest, RevokeKeyRequest};
use serde_json::json;

/// Make, list and revoke API keys.
///
/// On this Mac the HTTP API is open as long as the cluster has no key; from the first key on it asks everybody for one. An HTTP
/// listener that other machines can reach needs a key to start. Keys are valid on every node of the cluster.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode keys create ann
  mlxnode keys create ci --model demo --requests-per-minute 60 --tokens-per-minute 100000
  mlxnode keys create prometheus --role metrics
  mlxnode keys list
  mlxnode keys revoke ann")]
pub struct Keys {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a key. It is shown once: the cluster keeps only its hash.
    Create(Create),
    /// List the keys.
    List,
    /// End a key: every node refuses it within a second.
    Revoke {
        /// Name of the key.
        name: String,
    },
}

#[derive(Debug, Args)]
struct Create {
    /// Whose key it is, or what for.
    name: String,
    /// What it may do.
    #[arg(long, value_enum, default_value_t = Role::User)]
    role: Role,
    /// A model that it may ask, with the model's adapters; repeat for several. Default: all.
    #[arg(long = "model", value_name = "MODEL")]
    models: Vec<String>,
    /// Requests that it may make within any minute, on each node.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests_per_minute: Option<u32>,
    /// Tokens, of prompts and answers together, within any minute, on each node.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000_000))]
    tokens_per_minute: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    /// Ask models.
    User,
    /// The same, and fine-tune models that are loaded, over HTTP: its own files and jobs only.
    Trainer,
    /// All that there is: also load and unload models, keys, jobs.
    Admin,
    /// Read /metrics and nothing else.
    Metrics,
}

impl Keys {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        match self.action {
            Action::Create(create) => create.run(&connection, global).await,
            Action::List => list(&connection, global).await,
            Action::Revoke { name } => {
                connection.keys().revoke(RevokeKeyRequest { name: name.clone() }).await?;
                match global.json {
                    true => output::json(&json!({ "revoked": name })),
                    false => output::line(&format!("The key {name} is revoked.")),
                }
            }
        }
    }
}

impl Create {
    async fn run(self, connection: &Connection, global: &Global) -> Result<()> {
        let role = match self.role {
            Role::User => KeyRole::User,
            Role::Trainer => KeyRole::Trainer,
            Role::Admin => KeyRole::Admin,
            Role::Metrics => KeyRole::Metrics,
        };
        let key = ApiKey {
            name: self.name,
            role: role.into(),
            models: self.models,
            requests_per_minute: self.requests_per_minute.unwrap_or_default(),
            tokens_per_minute: self.tokens_per_minute.unwrap_or_default(),
            ..ApiKey::default()
        };
        let created = connection.keys().create(CreateKeyRequest { key: Some(key) }).await?.into_inner();
        let key = wire::key(created.key.context("the node made a key, but does not say which")?);
        if global.json {
            return output::json(&wire::NewKey { key: created.text, facts: key });
        }
        output::line(&created.text)?;
        crate::warnings::text(&format!("This is the key {}. Keep it: nobody can show it again.\n", key.name));
        Ok(())
    }
}

async fn list(connection: &Connection, global: &Global) -> Result<()> {
    let keys = connection.keys().list(ListKeysRequest {}).await?.into_inner().keys;
    let keys: Vec<wire::Key> = keys.into_iter().map(wire::key).collect();
    if global.json {
        return output::json(&json!({ "keys": keys }));
    }
    if keys.is_empty() {
        return output::line("There is no key. `mlxnode keys create NAME` makes one.");
    }
    let limit = |limit: Option<u32>| limit.map_or_else(|| "-".to_owned(), |limit| limit.to_string());
    let rows: Vec<Vec<String>> = keys
        .iter()
        .map(|key| {
            vec![
                key.name.clone(),
                key.role.to_owned(),
                if key.models.is_empty() { "all".to_owned() } else { key.models.join(", ") },
                limit(key.requests_per_minute),
                limit(key.tokens_per_minute),
                key.id.clone(),
            ]
        })
        .collect();
    output::table(&["name", "role", "models", "requests/min", "tokens/min", "id"], &rows)
}
