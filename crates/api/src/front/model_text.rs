//! Tokenizer and chat template of one model, ready for use.

use crate::deployments::DeploymentView;
use crate::front::{FrontError, Input};
use mlxnode_coordinator::requests::ModelLimits;
use mlxnode_coordinator::scheduler::RunError;
use mlxnode_text::{AnswerFormat, ChatRequest, ChatTemplate, Sandbox, TextError, TextFiles, Tokenizer};
use std::sync::Arc;

/// What turns text into a model's tokens and back.
pub struct ModelText {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Number of token ids that the model knows: `vocab_size` of its configuration.
    pub vocabulary: usize,
    /// How its answers mark reasoning and tool calls.
    pub answers: AnswerFormat,
    template: Option<ChatTemplate>,
}

impl ModelText {
    /// Reads the files. What they make us run runs in the sandbox first: templates always, the tokenizer once. Blocks.
    ///
    /// # Errors
    /// When a file is missing or is not what its name says, or asks for too much.
    pub fn new(files: &TextFiles, sandbox: Arc<dyn Sandbox>) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_untrusted_files(files, &*sandbox)?;
        let config: Option<serde_json::Value> =
            files.get("config.json").and_then(|bytes| serde_json::from_slice(bytes).ok());
        let declared = config
            .as_ref()
            .and_then(|config| {
                config.get("vocab_size").or_else(|| config.get("text_config")?.get("vocab_size"))
            })
            .and_then(serde_json::Value::as_u64)
            .and_then(|size| usize::try_from(size).ok());
        let vocabulary = declared.unwrap_or_else(|| tokenizer.vocabulary_size());
        let template = ChatTemplate::from_files(files, &tokenizer, sandbox)?;
        let answers = AnswerFormat::from_files(files, &tokenizer, template.as_ref())?;
        Ok(Self { tokenizer, vocabulary, answers, template })
    }

    /// What the model and its deployment allow.
    ///
    /// # Errors
    /// When the tokenizer cannot say how it writes a new line.
    pub fn limits(&self, deployment: &DeploymentView) -> Result<ModelLimits, TextError> {
        Ok(ModelLimits {
            vocabulary: self.vocabulary,
            context_tokens: deployment.context_tokens,
            eos_tokens: self.tokenizer.eos_tokens().iter().copied().collect(),
            xtc_special_tokens: self.tokenizer.xtc_special_tokens()?,
        })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// When the model has no chat template or the template refuses the conversation.
    pub fn render(&self, chat: &ChatRequest) -> Result<String, TextError> {
        self.template()?.render(chat)
    }

    fn template(&self) -> Result<&ChatTemplate, TextError> {
        self.template.as_ref().ok_or(TextError::NoChatTemplate)
    }

    /// The token ids of an input. A rendered conversation holds its special tokens already, so none are added.
    ///
    /// # Errors
    /// As [`ModelText::render`].
    pub fn tokenize(&self, input: &Input) -> Result<Vec<u32>, FrontError> {
        Ok(match input {
            Input::Prompt(text) => self.tokenizer.encode_prompt(text)?,
            // Not the rendered text: names of control tokens in a client's strings stay words.
            Input::Chat(chat) => self.template()?.encode(chat, &self.tokenizer)?,
            Input::Tokens(ids) => ids.clone(),
        })
    }

    /// [`ModelText::tokenize`] off the asynchronous threads: templates are other people's programs and prompts can be long.
    ///
    /// # Errors
    /// As [`ModelText::render`].
    pub async fn tokenize_blocking(self: Arc<Self>, input: Input) -> Result<Vec<u32>, FrontError> {
        match tokio::task::spawn_blocking(move || self.tokenize(&input)).await {
            Ok(tokens) => tokens,
            Err(error) => Err(RunError::Failed(format!("tokenizing failed: {error}")).into()),
        }
    }
}
