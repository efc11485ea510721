//! `mlxnode chat`: a conversation in the terminal.

use crate::answer::Answer;
use crate::arguments::Global;
use crate::commands::data_dir;
use crate::commands::generate::{MaxTokens, max_tokens};
use crate::generation::{Input, Model, Request};
use crate::interrupts::Interrupts;
use crate::prompt::ChatFlags;
use crate::sampling::SamplingFlags;
use crate::target::{self, Place};
use crate::{error, output, warnings};
use anyhow::{Context as _, Result};
use clap::Args;
use mlxnode_text::Message;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
/help   h   this
/reset  r   forget the conversation
/quit   q   leave (Ctrl-D too)
Ctrl-C      end the answer that is being written
";
/// mlx-lm's seed for chats.
const SEED: u64 = 0;
const HISTORY_LINES: usize = 1000;
/// Longest line of piped input.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Talk to a model.
///
/// Type a message, get an answer; the model sees the whole conversation. /help lists the commands. Without a terminal each line of
/// stdin is a message. Runs on the cluster when a node runs here, else in this process.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode chat
  mlxnode chat --model mlx-community/Qwen3-0.6B-4bit --system-prompt \"You are a pirate.\" --temp 0.7
  printf 'What is 2 + 3?\\nAnd 17 + 25?\\n' | mlxnode chat")]
pub struct Chat {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    chat: ChatFlags,
    /// Most tokens of one answer. -1: until the model ends.
    #[arg(short, long, value_name = "N", default_value = "256", value_parser = max_tokens, allow_hyphen_values = true)]
    max_tokens: MaxTokens,
    /// End an answer at this text, which is not part of it; repeat for several.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// More tokens that end an answer, as number or text.
    #[arg(long, value_name = "TOKEN")]
    extra_eos_token: Vec<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Do not keep what was typed for the next chat.
    #[arg(long)]
    no_history: bool,
}

impl Chat {
    pub fn run(self, global: &Global) -> Result<ExitCode> {
        let interrupts = Interrupts::listen()?;
        let model = target::open(global, &self.place)?;
        let history =
            if self.no_history { None } else { Some(data_dir(global)?.root().join("chat-history")) };
        let mut lines = Lines::open(history, global.quiet)?;
        let mut talk =
            Talk { messages: self.chat.opening(), turns: 0, flags: &self, global, interrupts, model };
        let mut failed = false;
        while let Some(line) = lines.next()? {
            match line.trim() {
                "" => {}
                "/quit" | "/q" | "/exit" | "q" => break,
                "/help" | "/h" | "/?" | "h" => warnings::text(HELP),
                "/reset" | "/r" | "r" => {
                    talk.messages = self.chat.opening();
                    talk.say("The conversation starts anew.\n");
                }
                command if command.starts_with('/') && !command.contains(char::is_whitespace) => {
                    talk.say(&format!("There is no command {command}; /help lists them.\n"));
                }
                message => {
                    // A refused message is not the end of the conversation.
                    if let Err(wrong) = talk.turn(message) {
                        failed = true;
                        error::report(&wrong);
                    }
                }
            }
        }
        lines.close();
        Ok(if failed && !lines.is_interactive() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// A conversation and the model that leads it.
struct Talk<'a> {
    messages: Vec<Message>,
    turns: u64,
    flags: &'a Chat,
    global: &'a Global,
    interrupts: Interrupts,
    model: Box<dyn Model>,
}

impl Talk<'_> {
    /// One message and its answer. When there is none, the conversation stays as it was.
    fn turn(&mut self, message: &str) -> Result<()> {
        let mut messages = self.messages.clone();
        messages.push(Message::new("user", message));
        let mut sampling = self.flags.sampling.sampling(Some(SEED), None);
        // Every turn draws anew; the whole conversation repeats with the same seed.
        sampling.seed = sampling.seed.wrapping_add(self.turns);
        let request = Request {
            input: Input::Chat(Box::new(self.flags.chat.request(messages.clone(), None))),
            sampling,
            max_tokens: self.flags.max_tokens.0,
            stop: self.flags.stop.clone(),
            extra_eos: self.flags.extra_eos_token.clone(),
        };
        let json = self.global.json;
        let mut show = |text: &str| if json { Ok(()) } else { output::text(text) };
        let answer = Answer::of(self.model.as_mut(), &request, &self.interrupts, &mut show);
        if json {
            answer.as_ref().map_or(Ok(()), |answer| answer.print_json(false))?;
        } else {
            output::line("")?;
        }
        let answer = answer?;
        messages.push(Message::new("assistant", answer.text));
        self.messages = messages;
        self.turns += 1;
        Ok(())
    }

    fn say(&self, words: &str) {
        if !self.global.quiet {
            warnings::text(words);
        }
    }
}

/// Where messages come from: a terminal with line editing, or the lines of a pipe.
enum Lines {
    Terminal { editor: Box<DefaultEditor>, history: Option<PathBuf> },
    Pipe,
}

impl Lines {
    fn open(history: Option<PathBuf>, quiet: bool) -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Pipe);
        }
        let config = rustyline::Config::builder()
            .max_history_size(HISTORY_LINES)
            .context("cannot set up line editing")?
            .auto_add_history(true)
            .build();
        let mut editor = DefaultEditor::with_config(config).context("cannot set up line editing")?;
        if let Some(file) = &history {
            let _ = editor.load_history(file); // there is none before the first chat
        }
        if !quiet {
            warnings::text("Type a message. /help lists the commands, Ctrl-D leaves.\n");
        }
        Ok(Self::Terminal { editor: Box::new(editor), history })
    }

    /// The next line; none at the end.
    fn next(&mut self) -> Result<Option<String>> {
        match self {
            Self::Terminal { editor, .. } => loop {
                match editor.readline("> ") {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(ReadlineError::Interrupted) => warnings::text("(Ctrl-D or /quit leaves)\n"),
                    Err(wrong) => return Err(wrong).context("cannot read from the terminal"),
                }
            },
            Self::Pipe => {
                let mut line = String::new();
                let mut stdin = std::io::stdin().lock().take(MAX_LINE_BYTES);
                let read = stdin.read_line(&mut line).context("cannot read a line of text from stdin")?;
                Ok((read > 0).then_some(line))
            }
        }
    }

    /// Keeps what was typed, readable by its owner only. Failing at that is no failure of the chat.
    fn close(&mut self) {
        let Self::Terminal { editor, history: Some(file) } = self else { return };
        let saved = file
            .parent()
            .map_or(Ok(()), create_private)
            .and_then(|()| editor.save_history(file).map_err(std::io::Error::other));
        if let Err(wrong) = saved {
            tracing::warn!("cannot keep what was typed in {}: {wrong}", file.display());
        }
    }

    fn is_interactive(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }
}

fn create_private(folder: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}
