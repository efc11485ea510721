//! `mlxnode load MODEL`: puts a model's layers on the nodes.

use crate::arguments::{Global, duration};
use crate::commands::plan::Wish;
use crate::commands::status;
use crate::connection::Connection;
use crate::{hub, output, warnings, wire};
use anyhow::{Context as _, Result};
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mlxnode_proto::v1::{LoadProgress, LoadRequest};
use std::collections::HashMap;
use std::time::Duration;

/// Load a model onto the cluster.
///
/// The model goes to one node when it fits there, and is split by layers over as few as it needs when not. `mlxnode plan` shows
/// the split beforehand.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode load mlx-community/Qwen3-8B-4bit
  mlxnode load demo --stages 2
  mlxnode load demo --replicas 2 --ttl 10m
  mlxnode load demo --pin --make-room")]
pub struct Load {
    #[command(flatten)]
    wish: Wish,
    /// What requests shall call it. Default: the model's name.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Load this many complete copies, on different nodes; requests go where their beginnings are cached.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    replicas: Option<u32>,
    /// Keep it until somebody unloads it, also when another model needs the room.
    #[arg(long, conflicts_with = "ttl")]
    pin: bool,
    /// Unload it when nobody asked for so long, such as 30s, 10m or 2h.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ttl: Option<Duration>,
    /// When it does not fit, unload models that are not pinned, those that were not used for longest first, once their requests have finished.
    #[arg(long)]
    make_room: bool,
}

impl Load {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        let request = LoadRequest {
            plan: Some(self.wish.request()),
            name: self.name.unwrap_or_default(),
            replicas: self.replicas.unwrap_or_default(),
            pin: self.pin,
            ttl_seconds: self.ttl.map_or(0, |ttl| ttl.as_secs().max(1)),
            make_room: self.make_room,
        };
        let mut progress = connection.models().load(request).await?.into_inner();
        let bars = Bars::new(global.quiet);
        let mut deployment = None;
        while let Some(message) = progress.message().await? {
            bars.show(&message);
            deployment = message.deployment.or(deployment);
        }
        bars.clear();
        let model = self.wish.model;
        let notes = tokio::task::spawn_blocking(move || hub::notes(&model)).await?;
        warnings::notes(&notes, global.quiet);
        let deployment =
            wire::deployment(deployment.context("the node ended the load without saying how it went")?);
        match global.json {
            true => output::json(&deployment),
            false => status::deployments(&[deployment]),
        }
    }
}

/// A progress bar for each node, on stderr; nothing is drawn when that is no terminal.
struct Bars {
    all: MultiProgress,
    by_node: std::cell::RefCell<HashMap<String, ProgressBar>>,
}

impl Bars {
    fn new(quiet: bool) -> Self {
        let all = MultiProgress::new();
        if quiet {
            all.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        Self { all, by_node: std::cell::RefCell::default() }
    }

    fn show(&self, message: &LoadProgress) {
        let mut bars = self.by_node.borrow_mut();
        let bar = bars.entry(message.node_name.clone()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new_spinner());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if message.total_bytes > 0 && bar.length().is_none() {
            let style = ProgressStyle::with_template(
                "{prefix:>12} {msg:12} {bar:32} {decimal_bytes}/{decimal_total_bytes}",
            );
            bar.set_style(style.expect("the template is constant"));
            bar.set_length(message.total_bytes);
        }
        bar.set_prefix(message.node_name.clone());
        let words = [message.phase.as_str(), message.detail.as_str()];
        bar.set_message(words.iter().filter(|word| !word.is_empty()).copied().collect::<Vec<_>>().join(": "));
        if message.total_bytes > 0 {
            bar.set_length(message.total_bytes);
            bar.set_position(message.done_bytes);
        }
    }

    fn clear(&self) {
        for bar in self.by_node.borrow().values() {
            bar.finish_and_clear();
        }
    }
}
