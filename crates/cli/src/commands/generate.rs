//! `mlxnode generate`: one prompt, one answer.

use crate::answer::Answer;
use crate::arguments::Global;
use crate::familiar::FamiliarFlags;
use crate::generation::{Input, MemoryOptions, Request};
use crate::interrupts::{self, Interrupts};
use crate::prompt::{self, ChatFlags};
use crate::sampling::SamplingFlags;
use crate::shape::ShapeFlags;
use crate::target::{self, InProcess, Place};
use crate::{output, warnings};
use anyhow::{Context as _, Result, bail};
use clap::{ArgAction, Args};
use mlxnode_engine::PromptCacheNotes;
use mlxnode_text::Message;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const RULE: &str = "==========\n";

/// Answer one prompt.
///
/// The prompt goes through the model's chat template; --ignore-chat-template sends it as it is. The answer goes to stdout as it is
/// written, speeds go to stderr. Runs on the cluster when a node runs here, else in this process.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode generate --prompt \"What is 17 + 25?\"
  mlxnode generate --model mlx-community/Qwen3-0.6B-4bit --temp 0.7 -m 500 -p \"Write a haiku about rain\"
  cat notes.txt | mlxnode generate --system-prompt \"Summarize this in one sentence.\" --prompt - --json
  mlxnode generate --prompt-cache-file book.safetensors -p \"\\nWho is the narrator?\"")]
pub struct Generate {
    #[command(flatten)]
    place: Place,
    /// The prompt. "-" reads it from stdin; in the text, \n is a line break and \t a tab.
    #[arg(short, long, value_name = "TEXT", default_value = "hello", allow_hyphen_values = true)]
    prompt: String,
    #[command(flatten)]
    chat: ChatFlags,
    /// The beginning of the answer; the model goes on from there.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prefill_response: Option<String>,
    /// Send the prompt as it is, without the model's chat template.
    #[arg(long)]
    ignore_chat_template: bool,
    /// Most tokens to generate. -1: until the model ends.
    #[arg(short, long, value_name = "N", default_value = "100", value_parser = max_tokens, allow_hyphen_values = true)]
    max_tokens: MaxTokens,
    /// End the answer at this text, which is not part of it; repeat for several.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// More tokens that end the answer, as number or text.
    #[arg(long, value_name = "TOKEN", num_args = 1..)]
    extra_eos_token: Vec<String>,
    /// Go on from a prompt that `mlxnode cache-prompt` or mlx-lm put into a file. Without --model: with the model that made it.
    #[arg(long, value_name = "FILE", conflicts_with = "max_kv_size")]
    prompt_cache_file: Option<PathBuf>,
    /// With --json: also each token's log-probability, and those of the K most likely tokens (0 to 20).
    #[arg(long, value_name = "K", requires = "json", value_parser = clap::value_parser!(u8).range(0..=20))]
    logprobs: Option<u8>,
    /// Show the speed and the memory after the answer.
    #[arg(long, value_name = "BOOL", default_value = "true", value_parser = truth, action = ArgAction::Set)]
    verbose: bool,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    shape: ShapeFlags,
    #[command(flatten)]
    in_process: InProcess,
    #[command(flatten)]
    familiar: FamiliarFlags,
}

/// How many tokens at most; none is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxTokens(pub Option<usize>);

impl Generate {
    pub fn run(mut self, global: &Global) -> Result<ExitCode> {
        // Looked at before the model is: what is wrong with the request shows at once.
        self.familiar.check(global)?;
        let memory = match self.prompt_cache_file.clone() {
            None => MemoryOptions::Nothing,
            Some(file) => {
                self.go_on_from(&file)?;
                MemoryOptions::File(file)
            }
        };
        let request = self.request(global)?;
        let interrupts = Interrupts::listen()?;
        let mut model = target::open(global, &self.place, &self.in_process, memory)?;
        let framed = self.verbose && !global.json && !global.quiet;
        let mut begun = false;
        let answer = Answer::of(model.as_mut(), &request, &interrupts, &mut |piece| {
            if framed && !begun {
                warnings::text(RULE);
            }
            begun = true;
            if global.json { Ok(()) } else { output::text(&piece.text) }
        })?;
        if global.json {
            answer.print_json(self.logprobs.is_some())?;
            answer.warn(global.quiet);
        } else {
            output::line("")?;
        }
        if framed {
            warnings::text(RULE);
            if answer.text.is_empty() {
                warnings::text("No text was generated for this prompt.\n");
            }
            warnings::text(&answer.statistics());
        }
        Ok(interrupts::exit_code(answer.was_interrupted()))
    }

    /// Takes over what the file notes: the model, which must not be another one, and the tokenizer's options.
    fn go_on_from(&mut self, file: &Path) -> Result<()> {
        let unusable = || format!("cannot go on from {}", file.display());
        let notes = PromptCacheNotes::read(file).with_context(unusable)?;
        match (&self.place.model, notes.model) {
            (Some(given), Some(noted)) if !is_same_model(given, &noted) => bail!(
                "{} was made by the model {noted}, but --model is {given}; leave --model out, or make the file anew",
                file.display()
            ),
            (None, Some(noted)) => self.place.model = Some(noted),
            _ => {}
        }
        if let Some(text) = notes.tokenizer_config {
            let config: Value = serde_json::from_str(&text)
                .context("its note tokenizer_config is not JSON")
                .with_context(unusable)?;
            self.extra_eos_token.extend(config["eos_token"].as_str().map(str::to_owned));
        }
        Ok(())
    }

    fn request(&self, global: &Global) -> Result<Request> {
        if self.prompt == "-" && self.shape.reads_stdin() {
            bail!("--prompt - and --json-schema - both read stdin; put one of them into a file");
        }
        let (tools, shape) = self.shape.read()?;
        let prompt = prompt::read(&self.prompt)?;
        let input = if self.ignore_chat_template {
            if self.shape.has_tools() {
                bail!("--tools needs the model's chat template; leave --ignore-chat-template out");
            }
            if (self.chat.are_given() || self.prefill_response.is_some()) && !global.quiet {
                warnings::text(
                    "warning: --ignore-chat-template makes --system-prompt, --prefill-response, --thinking, --no-thinking and \
                     --chat-template-config have no effect\n",
                );
            }
            Input::Text(prompt)
        } else {
            let mut messages = self.chat.opening();
            messages.push(Message::new("user", prompt));
            Input::Chat(Box::new(self.chat.request(messages, self.prefill_response.clone(), tools)))
        };
        Ok(Request {
            input,
            sampling: self.sampling.sampling(None, self.logprobs.map(usize::from)),
            max_tokens: self.max_tokens.0,
            stop: self.stop.clone(),
            extra_eos: self.extra_eos_token.clone(),
            shape,
        })
    }
}

/// The same name, or two names of one folder.
fn is_same_model(one: &str, other: &str) -> bool {
    let folder = |name: &str| Path::new(name).canonicalize().ok();
    one == other || folder(one).is_some_and(|one| folder(other) == Some(one))
}

/// -1 or a number from 1 on.
pub fn max_tokens(text: &str) -> Result<MaxTokens, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(MaxTokens(None)),
        Ok(0) => Err("it must not be 0; use -1 for no limit".to_owned()),
        Ok(number) => {
            usize::try_from(number).map(Some).map(MaxTokens).map_err(|_| "it must be 1 or more, or -1".into())
        }
        Err(_) => Err("it must be a number, or -1 for no limit".to_owned()),
    }
}

/// The truth values that mlx-lm's command line knows.
fn truth(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "1" => Ok(true),
        "false" | "f" | "no" | "n" | "0" => Ok(false),
        _ => Err("use true or false".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_positive_or_none() {
        assert_eq!(max_tokens("7"), Ok(MaxTokens(Some(7))));
        assert_eq!(max_tokens("-1"), Ok(MaxTokens(None)));
        for wrong in ["0", "-2", "", "many", "1.5", "99999999999999999999"] {
            assert!(max_tokens(wrong).is_err(), "{wrong}");
        }
    }
}
