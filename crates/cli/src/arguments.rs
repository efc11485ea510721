//! The words of the command line. Each command's own arguments stand beside the command.

use crate::commands::{
    adapters, benchmark, cache_prompt, chat, completions, forget, fuse, generate, invite, join, keys, leave,
    load, lora, models, perplexity, plan, sandbox, status, top, unload, worker,
};
use clap::builder::RangedI64ValueParser;
use clap::{Args, Parser, Subcommand};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

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
    Lora(Box<lora::Lora>),
    Fuse(fuse::Fuse),
    Completions(completions::Completions),
    #[command(hide = true)]
    Sandbox(sandbox::Sandbox),
    #[command(hide = true)]
    Worker(worker::Worker),
}

/// "90s", "10m", "1.5h", "2d": at least a second.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|it: char| !it.is_ascii_digit() && it != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        "" => return Err("a time needs a unit: s, m, h or d, as in 10m".to_owned()),
        _ => return Err(format!("{unit:?} is no unit of time; use s, m, h or d")),
    };
    match number.parse::<f64>() {
        Ok(number) if (1.0..=3e9).contains(&(number * factor)) => {
            Ok(Duration::from_secs_f64(number * factor))
        }
        _ => Err("a time is a number and a unit, such as 10m, and at least a second".to_owned()),
    }
}

/// A whole number within these bounds.
pub fn within(range: RangeInclusive<i64>) -> RangedI64ValueParser<u32> {
    RangedI64ValueParser::new().range(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_write_them() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "10", "m", "0s", "-1m", "10 parsecs", "1e99h", "99999999d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
