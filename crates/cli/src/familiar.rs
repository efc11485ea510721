//! Flags that mlx-lm's users have in their fingers and scripts, and that do nothing here or cannot be obeyed.
//!
//! Those that make no difference are taken with a note; those that would change the answer are refused, with what to do instead.

use crate::arguments::Global;
use crate::warnings;
use anyhow::{Result, bail};
use clap::Args;

/// Such flags. Not in the help: there is nothing to use them for.
#[derive(Clone, Debug, Default, Args)]
pub struct FamiliarFlags {
    #[arg(long, hide = true)]
    trust_remote_code: bool,
    #[arg(long, hide = true)]
    use_default_chat_template: bool,
    #[arg(long, hide = true)]
    pipeline: bool,
    #[arg(long, hide = true, value_name = "FILE", num_args = 1..)]
    image: Vec<String>,
    #[arg(long, hide = true)]
    quantize_activations: bool,
}

impl FamiliarFlags {
    /// Says what each one comes to; an error for those that cannot be obeyed. To be called before anything is loaded.
    pub fn check(&self, global: &Global) -> Result<()> {
        if !self.image.is_empty() {
            bail!("--image: models answer text only; leave the images out");
        }
        if self.quantize_activations {
            bail!(
                "--quantize-activations is not supported: activations are computed as the model stores them; leave it out"
            );
        }
        let notes = [
            (self.trust_remote_code, "--trust-remote-code has no effect: a model's own code is never run"),
            (
                self.use_default_chat_template,
                "--use-default-chat-template has no effect: the template is the model's",
            ),
            (
                self.pipeline,
                "--pipeline has no effect: `mlxnode load MODEL --stages N` splits a model over nodes",
            ),
        ];
        for (_, words) in notes.iter().filter(|(given, _)| *given && !global.quiet) {
            warnings::text(&format!("note: {words}\n"));
        }
        Ok(())
    }
}
