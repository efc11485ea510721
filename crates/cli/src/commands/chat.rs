//! `mlxnode chat`: a conversation in the terminal.

use crate::answer::Answer;
use crate::arguments::Global;
use crate::commands::data_dir;
use crate::commands::generate::{MaxTokens, max_tokens};
use crate::familiar::FamiliarFlags;
use crate::generation::{Input, MemoryOptions, Model, Request, Shape};
use crate::interrupts::Interrupts;
use crate::lines::Lines;
use crate::prompt::ChatFlags;
use crate::sampling::SamplingFlags;
use crate::shape::ShapeFlags;
use crate::target::{self, InProcess, Place};
use crate::view::{Style, View};
use crate::{error, warnings};
use anyhow::{Result, bail};
use clap::Args;
use mlxnode_text::Message;
use serde_json::Value;
use std::io::IsTerminal as _;
use std::process::ExitCode;

const HELP: &str = "\
/help   h   this
/reset  r   forget the conversation
/quit   q   leave (Ctrl-D too)
Ctrl-C      end the answer that is being written
A line that ends in \\ goes on in the next; a message between \"\"\" and \"\"\" may have many lines.
";
/// mlx-lm's seed for chats.
const SEED: u64 = 0;

/// Talk to a model.
///
/// Type a message, get an answer; the model sees the whole conversation, and processes only what is new of it. /help lists the
/// commands. In a terminal, what the model thinks before it answers is faint. Without a terminal each line of stdin is a message.
/// Runs on the cluster when a node runs here, else in this process.
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
    /// Do not keep what was typed for the next chat.
    #[arg(long)]
    no_history: bool,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    shape: ShapeFlags,
    #[command(flatten)]
    in_process: InProcess,
    #[command(flatten)]
    familiar: FamiliarFlags,
}

impl Chat {
    pub fn run(self, global: &Global) -> Result<ExitCode> {
        self.familiar.check(global)?;
        if self.shape.reads_stdin() {
            bail!("--json-schema - reads stdin, where messages come from; put the schema into a file");
        }
        let (tools, shape) = self.shape.read()?;
        let interrupts = Interrupts::listen()?;
        let model = target::open(global, &self.place, &self.in_process, MemoryOptions::Conversation)?;
        let history =
            if self.no_history { None } else { Some(data_dir(global)?.root().join("chat-history")) };
        let mut lines = Lines::open(history, global.quiet)?;
        let mut talk = Talk {
            messages: self.chat.opening(),
            turns: 0,
            flags: &self,
            global,
            interrupts,
            model,
            tools,
            shape,
        };
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
    tools: Option<Vec<Value>>,
    shape: Shape,
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
            input: Input::Chat(Box::new(self.flags.chat.request(messages.clone(), None, self.tools.clone()))),
            sampling,
            max_tokens: self.flags.max_tokens.0,
            stop: self.flags.stop.clone(),
            extra_eos: self.flags.extra_eos_token.clone(),
            shape: self.shape.clone(),
        };
        let mut view = match self.global.json {
            true => View::Silent,
            false if std::io::stdout().is_terminal() => View::Styled(Style::default()),
            false => View::Raw,
        };
        let answer =
            Answer::of(self.model.as_mut(), &request, &self.interrupts, &mut |piece| view.show(piece));
        view.end()?;
        let answer = answer?;
        if self.global.json {
            answer.print_json(false)?;
        }
        answer.warn(self.global.quiet);
        messages.push(repeated(&answer));
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

/// An answer as the model sees it in the next turn: its template decides what becomes of the reasoning. An answer with tool calls
/// is repeated as it was written, since nobody called anything.
fn repeated(answer: &Answer) -> Message {
    let parts = &answer.parts;
    match parts.tool_calls.is_empty() && parts.warnings.is_empty() {
        true => {
            let mut message = Message::new("assistant", parts.content.clone());
            message.extra.extend(
                parts.reasoning.clone().map(|reasoning| ("reasoning_content".to_owned(), reasoning.into())),
            );
            message
        }
        false => Message::new("assistant", answer.text.clone()),
    }
}
