//! Where a generation runs: on the cluster when a node runs with this data directory, else in this process.

use crate::adapter::AdapterFlag;
use crate::arguments::Global;
use crate::caching::CacheFlags;
use crate::commands::data_dir;
use crate::connection::Connection;
use crate::generation::{ClusterModel, LocalModel, LocalOptions, MemoryOptions, Model};
use crate::guessing::GuessFlags;
use crate::hub;
use crate::prefill::PrefillFlags;
use anyhow::{Context as _, Result, bail};
use clap::Args;
use tokio::runtime::Runtime;

/// Which model, and where.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// A folder, a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION), or demo; on a cluster the name of a loaded model.
    ///
    /// Default: on a cluster the only loaded model, else the demo model that is built in.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Run in this process even when a node runs here.
    #[arg(long)]
    local: bool,
    #[command(flatten)]
    prefill: PrefillFlags,
}

/// How a model runs in this process. Apart from [`Place`], because the headings of these flags would go on over what follows them.
#[derive(Clone, Debug, Args)]
pub struct InProcess {
    #[command(flatten)]
    cache: CacheFlags,
    #[command(flatten, next_help_heading = "Speed (in this process)")]
    guesses: GuessFlags,
    #[command(flatten)]
    adapter: AdapterFlag,
}

/// Where it runs.
pub enum Target {
    /// In this process.
    Local,
    /// On the cluster of the node that runs here.
    Cluster(Runtime, Connection),
}

/// Decides. The look for a node costs one small file; the network is touched only when one runs.
pub fn choose(global: &Global, place: &Place) -> Result<Target> {
    if place.local || data_dir(global)?.read_running().is_none() {
        return Ok(Target::Local);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(1)
        .build()
        .context("cannot start the asynchronous runtime")?;
    match runtime.block_on(Connection::open_if_running(global))? {
        Some(connection) => Ok(Target::Cluster(runtime, connection)),
        None => Ok(Target::Local),
    }
}

/// The model that answers, ready. In this process its prompts come after what `memory` says; a cluster has its own ways.
pub fn open(
    global: &Global,
    place: &Place,
    own: &InProcess,
    memory: MemoryOptions,
) -> Result<Box<dyn Model>> {
    match choose(global, place)? {
        Target::Cluster(runtime, connection) => {
            let file = matches!(memory, MemoryOptions::File(_)).then_some("--prompt-cache-file");
            let adapter = own.adapter.adapter_path.is_some().then_some("--adapter-path");
            if let Some(flag) = file.or(adapter).or(own.cache.given()).or(own.guesses.given()) {
                bail!(
                    "{flag} works only in this process, but a node runs here: add --local, or leave {flag} out to ask the cluster"
                );
            }
            let model = place.model.clone().unwrap_or_default();
            Ok(Box::new(ClusterModel::new(runtime, connection, model, own.guesses.at_once())))
        }
        Target::Local => {
            let quiet = global.quiet;
            let folder = hub::folder(place.model.as_deref().unwrap_or("demo"), quiet)?;
            let options = LocalOptions {
                prefill_step: place.prefill.step(),
                cache: own.cache.options(),
                guesses: own.guesses.guesses(),
                adapter: own.adapter.clone(),
                memory,
            };
            Ok(Box::new(LocalModel::load(&folder, options, quiet)?))
        }
    }
}
