//! `cargo xtask soak`: tests that take chances, as often as one likes and from the seed that one names.

use crate::environment::{Environment, TemporaryFolder};
use crate::places::Places;
use crate::{build, command, setup};
use anyhow::Result;
use clap::{Args, Subcommand};

/// Arguments of the command.
#[derive(Args)]
pub(crate) struct Soak {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// Fine-tune on two or three nodes while workers, nodes, the coordinator or all of them are killed at seeded moments
    Jobs {
        /// So many jobs, one after the other
        #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..))]
        runs: u64,
        /// Of the first job's moments; the next ones have the next seeds
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
    },
}

impl Soak {
    /// Runs the subject, and shows what happens.
    pub(crate) fn run(&self, places: &Places) -> Result<()> {
        setup::ensure(places)?;
        let oracle = setup::oracle::ensure(places)?;
        build::binary(places, false)?;
        let folder = TemporaryFolder::new("soak")?;
        let environment =
            Environment { oracle: &oracle, temporary: folder.path(), libraries: &places.wheel_libraries() };
        let Subject::Jobs { runs, seed } = &self.subject;
        let mut cargo = command::cargo(&places.repository);
        environment.apply(&mut cargo);
        cargo.env("MLXNODE_SOAK_RUNS", runs.to_string()).env("MLXNODE_SOAK_SEED", seed.to_string());
        cargo.args(["test", "--package", "mlxnode-proto", "--test", "jobs_killed"]);
        command::run(cargo.args(command::lock_arguments()).args(["--", "--nocapture"]))
    }
}
