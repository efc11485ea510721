//! From the words of the command line to what a model continues.

use anyhow::{Context as _, Result, bail};
use clap::Args;
use mlxnode_text::{ChatRequest, Message};
use serde_json::{Map, Value};
use std::io::Read as _;

/// No context holds a prompt of this size, so what is longer is a mistake (a binary file, an endless pipe).
const MAX_STDIN_BYTES: u64 = 64 << 20;

/// What a conversation starts with.
#[derive(Clone, Debug, Args)]
pub struct ChatFlags {
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    system_prompt: Option<String>,
    /// Further variables for the chat template: a JSON object, such as '{"enable_thinking": false}'.
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    chat_template_config: Option<Map<String, Value>>,
    /// Let the model think before it answers. Default: it does if it can.
    #[arg(long, overrides_with = "no_thinking")]
    thinking: bool,
    /// Let the model answer at once, if its chat template has a switch for that.
    #[arg(long, overrides_with = "thinking")]
    no_thinking: bool,
}

impl ChatFlags {
    /// The conversation before the first question.
    pub fn opening(&self) -> Vec<Message> {
        self.system_prompt.iter().map(|text| Message::new("system", text)).collect()
    }

    /// A conversation that waits for an answer, which may have begun.
    pub fn request(
        &self,
        messages: Vec<Message>,
        prefill: Option<String>,
        tools: Option<Vec<Value>>,
    ) -> ChatRequest {
        ChatRequest {
            messages,
            tools,
            documents: None,
            add_generation_prompt: prefill.is_none(),
            continue_final: prefill,
            thinking: self.thinking(),
            arguments: self.chat_template_config.clone().unwrap_or_default(),
        }
    }

    /// Some flag for the chat template was given.
    pub fn are_given(&self) -> bool {
        self.system_prompt.is_some() || self.chat_template_config.is_some() || self.thinking().is_some()
    }

    fn thinking(&self) -> Option<bool> {
        (self.thinking || self.no_thinking).then_some(self.thinking)
    }
}

/// The prompt of `--prompt`: "-" is all of stdin as it is; else the two characters `\n` mean a line break and `\t` a tab.
pub fn read(flag: &str) -> Result<String> {
    if flag == "-" { stdin() } else { Ok(flag.replace("\\n", "\n").replace("\\t", "\t")) }
}

/// All of stdin, as it is.
pub fn stdin() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().take(MAX_STDIN_BYTES + 1).read_to_end(&mut bytes).context("cannot read stdin")?;
    if bytes.len() as u64 > MAX_STDIN_BYTES {
        bail!("the prompt on stdin is longer than {} MiB", MAX_STDIN_BYTES >> 20);
    }
    String::from_utf8(bytes).context("the prompt on stdin is not UTF-8 text")
}

fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        chat: ChatFlags,
    }

    fn parse(flags: &str) -> ChatFlags {
        let words = ["x"].into_iter().chain(flags.split_whitespace());
        <Flags as clap::Parser>::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).chat
    }

    #[test]
    fn the_last_word_on_thinking_counts() {
        for (flags, expected) in [
            ("", None),
            ("--thinking", Some(true)),
            ("--no-thinking", Some(false)),
            ("--thinking --no-thinking", Some(false)),
            ("--no-thinking --thinking", Some(true)),
        ] {
            assert_eq!(parse(flags).request(Vec::new(), None, None).thinking, expected, "{flags}");
        }
    }

    #[test]
    fn line_breaks_and_tabs_can_be_typed() {
        assert_eq!(read("a\\nb\\tc").unwrap(), "a\nb\tc");
        assert_eq!(read("a\nb").unwrap(), "a\nb");
    }

    #[test]
    fn a_begun_answer_leaves_no_room_for_another() {
        let flags = parse("--system-prompt S");
        let messages = flags.opening();
        assert_eq!(messages, [Message::new("system", "S")]);
        assert!(flags.request(messages.clone(), None, None).add_generation_prompt);
        assert!(!flags.request(messages, Some("Yes".into()), None).add_generation_prompt);
    }
}
