//! `mlxnode sandbox` (hidden): carries out chat templates and tries tokenizers, with little memory. Nodes and commands start it;
//! people do not.

use anyhow::Result;
use clap::Args;

/// Carry out what a model's files bring along, for the process that started this one.
#[derive(Debug, Args)]
pub struct Sandbox {}

impl Sandbox {
    pub fn run(self) -> Result<()> {
        Ok(mlxnode_sandbox::serve(|bytes| crate::MEMORY.set_limit(bytes).is_ok())?)
    }
}
