//! `mlxnode completions SHELL`: the shell learns the commands and flags.

use crate::arguments::Arguments;
use crate::output;
use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _, ValueEnum};
use clap_complete::aot;

/// Print the completion script of a shell.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode completions zsh > ~/.zfunc/_mlxnode
  mlxnode completions bash > ~/.local/share/bash-completion/completions/mlxnode
  mlxnode completions fish > ~/.config/fish/completions/mlxnode.fish")]
pub struct Completions {
    /// Which shell.
    shell: Shell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Completions {
    pub fn run(self) -> Result<()> {
        let generator = match self.shell {
            Shell::Bash => aot::Shell::Bash,
            Shell::Zsh => aot::Shell::Zsh,
            Shell::Fish => aot::Shell::Fish,
        };
        let mut script = Vec::new();
        aot::generate(generator, &mut Arguments::command(), "mlxnode", &mut script);
        output::text(&String::from_utf8(script).context("the completion script is not text")?)
    }
}
