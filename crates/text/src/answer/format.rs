//! A model's way of marking reasoning and tool calls, told from its files.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::{
    AnswerParser,
    rules::{Messages, Rules},
};
use crate::{ChatTemplate, ReasoningMarkers, TextError, TextFiles, Tokenizer, ToolFormat, reasoning};

const MUSE_SPARK: &str = "muse_spark";

/// How one model's answers are to be read. Made once per model; cheap to clone.
#[derive(Clone, Debug)]
pub struct AnswerFormat {
    tokenizer: Tokenizer,
    reasoning: Option<Arc<ReasoningMarkers>>,
    tools: Option<ToolFormat>,
    rules: Arc<Rules>,
}

/// The parts of tokenizer_config.json and config.json that settle the matter.
#[derive(Default, Deserialize)]
struct Declared {
    #[serde(default)]
    tool_parser_type: Option<Value>,
    #[serde(default)]
    chat_template_type: Option<String>,
}

#[derive(Default, Deserialize)]
struct ModelConfig {
    #[serde(default)]
    model_type: Option<String>,
}

impl AnswerFormat {
    /// Tells the format from the vocabulary and the chat template, unless tokenizer_config.json says it by
    /// `tool_parser_type` or `chat_template_type`. A `tool_parser_type` that nobody knows is an error.
    pub fn from_files(
        files: &TextFiles,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
    ) -> Result<Self, TextError> {
        let declared: Declared = files.json("tokenizer_config.json")?.unwrap_or_default();
        let model: ModelConfig = files.json("config.json")?.unwrap_or_default();
        // Muse Spark's checkpoints may leave it out; mlx-lm's model then says it for them.
        let model_default = model.model_type.filter(|model_type| model_type == MUSE_SPARK);
        let template_type = declared.chat_template_type.or_else(|| model_default.clone());
        let has_token = |token: &str| tokenizer.token_to_id(token).is_some();
        let tools = match (&declared.tool_parser_type, template_type.as_deref()) {
            (Some(name), _) if !name.is_null() => Some(named(name)?),
            (_, Some("deepseek_v32")) => Some(ToolFormat::DeepSeekV32),
            _ if model_default.is_some() => Some(ToolFormat::MuseSpark),
            _ => ToolFormat::inferred(template.and_then(ChatTemplate::source), has_token),
        };
        let messages = match (template_type.as_deref(), tools) {
            (Some(MUSE_SPARK), _) => Some(Messages::MuseSpark),
            (_, Some(ToolFormat::Harmony)) => Some(Messages::Harmony),
            _ => None,
        };
        let reasoning = ReasoningMarkers::of(tokenizer)?.map(Arc::new);
        let rules = Rules::new(reasoning.as_deref(), tools, messages, reasoning::is_xtml(tokenizer));
        Ok(Self { tokenizer: tokenizer.clone(), reasoning, tools, rules: Arc::new(rules) })
    }

    /// A reader for the answer to `prompt`, a request with these function schemas (none: an empty list).
    pub fn parser(&self, tools: &[Value], prompt: &[u32]) -> Result<AnswerParser, TextError> {
        let in_reasoning = self.reasoning.as_ref().is_some_and(|marks| marks.open_after(prompt));
        let mut parser = AnswerParser::new(self.rules.clone(), self.tools, tools, in_reasoning);
        if self.rules.messages == Some(Messages::Harmony) {
            // The prompt ends in the header of the answer, or inside of an answer that is to be continued.
            let start = self.tokenizer.token_to_id("<|start|>");
            let begin = prompt.iter().rposition(|id| Some(*id) == start).map_or(prompt.len(), |at| at + 1);
            parser.continue_message(&self.tokenizer.decode(&prompt[begin..], false)?);
        }
        Ok(parser)
    }

    /// How tool calls are written; none where the model knows no tools.
    pub fn tools(&self) -> Option<ToolFormat> {
        self.tools
    }

    /// The marks around reasoning; none where it does not reason or does so in messages of their own.
    pub fn reasoning(&self) -> Option<&ReasoningMarkers> {
        self.reasoning.as_deref()
    }
}

fn named(name: &Value) -> Result<ToolFormat, TextError> {
    name.as_str().and_then(ToolFormat::by_name).ok_or_else(|| {
        let known: Vec<&str> = ToolFormat::ALL.into_iter().map(ToolFormat::name).collect();
        TextError::InvalidFile {
            file: "tokenizer_config.json".to_owned(),
            reason: format!("tool_parser_type is {name}, but must be one of {}", known.join(", ")),
        }
    })
}
