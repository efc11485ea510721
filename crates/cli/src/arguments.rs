//! The words of the command line. Each command's own arguments stand beside the command.

use crate::commands::{
    adapters, benchmark, cache_prompt, chat, completions, forget, generate, invite, join, keys, leave, load,
    models, perplexity, plan, sandbox, status, top, unload, worker,
};
use clap::builder::RangedI64ValueParser;
use clap::{Args, Parser, Subcommand};
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// Several Macs on a desk become one machine for large language models.
///
/// Without any node, `mlxnode generate` and `mlxnode chat` run a model in this process; with no --model they run a small demo
/// model that is built in. With a node running here, they run on the cluster.
#[derive(Debug, Parser)]
#[command(
    name = "mlxnode",
    version = crate::output::version(),
    about,
    long_about,
    max_term_width = 110,
    after_help = "\
Examples:
  mlxnode generate --prompt \"What is 17 + 25?\"

A cluster takes one command on each Mac:
  mlxnode join                        the first Mac: makes a cluster
  mlxnode invite                      prints a code
  mlxnode join --invite 7H2K-93QF     every other Mac
  mlxnode load MODEL && mlxnode chat

Exit status:
  0    done
  1    it failed; one sentence on stderr says why
  2    the command line was wrong
  130  interrupted"
)]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Folder with this node's key and state. Several nodes on one machine need one each.
    ///
    /// Default: the platform's place for application data.
    #[arg(long, global = true, env = "MLXNODE_DATA_DIR", value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// Print facts as JSON on stdout.
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on stderr; twice: everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose_log: u8,
    /// Only errors on stderr.
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Join(join::Join),
    Invite(invite::Invite),
    Leave(leave::Leave),
    Forget(forget::Forget),
    Status(status::Status),
    Top(top::Top),
    Plan(plan::Plan),
    Load(load::Load),
    Unload(unload::Unload),
    Models(models::Models),
    Adapters(adapters::Adapters),
    Keys(keys::Keys),
    Generate(Box<generate::Generate>),
    Chat(Box<chat::Chat>),
    CachePrompt(Box<cache_prompt::CachePrompt>),
    Benchmark(benchmark::Benchmark),
    Perplexity(perplexity::Perplexity),
    Completions(completions::Completions),
    #[command(hide = true)]
    Sandbox(sandbox::Sandbox),
    #[command(hide = true)]
    Worker(worker::Worker),
}

/// A whole number within these bounds.
pub fn within(range: RangeInclusive<i64>) -> RangedI64ValueParser<u32> {
    RangedI64ValueParser::new().range(range)
}
