//! What a client can get wrong, or what can go wrong for it, whatever it speaks. HTTP's dialects and gRPC say it in their own shapes:
//! `http/error.rs`, `inference/status.rs`.

use crate::front::FrontError;
use crate::gate::Denied;
use mlxnode_coordinator::requests::RequestError;
use mlxnode_coordinator::scheduler::RunError;
use mlxnode_text::TextError;
use mlxnode_text::grammar::AnswerGrammarError;
use std::time::Duration;

/// A refusal or a failure. The text is for the person, everything else for the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// What kind of trouble; decides the status.
    pub kind: ErrorKind,
    /// A sentence that says what to do.
    pub message: String,
    /// The field that is wrong, as `messages[2].content`.
    pub param: Option<String>,
    /// When it is worth trying again.
    pub retry_after: Option<Duration>,
    /// A word for programs where the kind says too little.
    pub code: Option<&'static str>,
}

/// What kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// 400: the request is wrong.
    Invalid,
    /// 401: no key, or one that is not valid.
    Unauthorized,
    /// 403: known, but not allowed.
    Forbidden,
    /// 404: no such path.
    NoRoute,
    /// 404: no such model.
    NoModel,
    /// 404: nothing else of this name.
    NotFound,
    /// 405: the path has other methods.
    Method,
    /// 408: the request came too slowly.
    TooSlow,
    /// 409: not in the state that things are in.
    Conflict,
    /// 413: the body is too large.
    TooLarge,
    /// 429: too much at once.
    RateLimited,
    /// 500: our fault; the message has nothing about the inside.
    Internal,
    /// 503: not now.
    Unavailable,
    /// 503: the client's deadline passed.
    Deadline,
    /// 503: whoever asked wants it no more.
    Cancelled,
}

impl ApiError {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, retry_after: None, code: None }
    }

    /// A field is wrong: 400.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(ErrorKind::Invalid, message) }
    }

    /// For a key that is held to some models: it does not learn the names of the others.
    #[must_use]
    pub(crate) fn without_names(self) -> Self {
        match self.kind {
            // Which one is meant is not clear: the text names all.
            ErrorKind::Invalid if self.param.as_deref() == Some("model") => {
                Self::field("model", "name a model; the list of models has those that this API key may use")
            }
            ErrorKind::NoModel => {
                let message = "there is no model of this name, or this API key may not use it; the list of models has those it may";
                Self { param: self.param, ..Self::new(ErrorKind::NoModel, message) }
            }
            _ => self,
        }
    }

    /// With a word for programs.
    #[must_use]
    pub(crate) fn coded(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// With the time after which it is worth trying again.
    #[must_use]
    pub fn retry_after(self, time: Duration) -> Self {
        Self { retry_after: Some(time), ..self }
    }
}

/// A moment: what waits for a queue or a restarting worker.
const SOON: Duration = Duration::from_secs(2);

impl From<FrontError> for ApiError {
    fn from(error: FrontError) -> Self {
        let text = error.to_string();
        match error {
            FrontError::UnknownModel { .. } | FrontError::UnknownAdapter { .. } => {
                Self { param: Some("model".to_owned()), ..Self::new(ErrorKind::NoModel, text) }
            }
            FrontError::AmbiguousModel(_) => Self::field("model", text),
            FrontError::OtherDraft { .. } => Self::field("draft_model", text),
            FrontError::Busy { retry_after, .. } => {
                Self::new(ErrorKind::RateLimited, text).retry_after(retry_after)
            }
            FrontError::BrokenAdapter { .. } | FrontError::NotLoaded { .. } => {
                Self::new(ErrorKind::Unavailable, text).retry_after(SOON)
            }
            FrontError::NotReady { .. } => Self::new(ErrorKind::Unavailable, text).retry_after(SOON),
            FrontError::Request(error) => {
                Self { param: request_param(&error), ..Self::new(ErrorKind::Invalid, text) }
            }
            FrontError::Text(error) => text_error(&error),
            FrontError::Run(error) => error.into(),
        }
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        let text = denied.to_string();
        match denied {
            Denied::NoKey | Denied::WrongKey => Self::new(ErrorKind::Unauthorized, text),
            Denied::WrongRole { .. } => Self::new(ErrorKind::Forbidden, text),
            Denied::NotKnownYet => {
                Self::new(ErrorKind::Unavailable, text).retry_after(Duration::from_secs(1))
            }
            Denied::Exhausted(exhausted) => {
                Self::new(ErrorKind::RateLimited, text).retry_after(exhausted.wait)
            }
        }
    }
}

fn request_param(error: &RequestError) -> Option<String> {
    let field = match error {
        RequestError::EmptyPrompt | RequestError::PromptTooLong { .. } => return None,
        RequestError::Token { field, .. } | RequestError::TooMany { field, .. } => field,
        RequestError::StopLength { .. } => "stop",
        RequestError::Range { parameter, .. } => parameter,
    };
    Some(field.to_owned())
}

/// What the client sent, or what the model's files are?
fn text_error(error: &TextError) -> ApiError {
    let text = error.to_string();
    match error {
        TextError::MissingFile { .. }
        | TextError::OwnTokenizerCode { .. }
        | TextError::FileTooLarge { .. }
        | TextError::UnknownFile { .. }
        | TextError::Read { .. }
        | TextError::InvalidFile { .. }
        | TextError::Tokenizer { .. }
        | TextError::TokenizerCost { .. } => ApiError::new(ErrorKind::Internal, text),
        TextError::SandboxBusy => ApiError::new(ErrorKind::RateLimited, text).retry_after(SOON),
        TextError::Sandbox { .. } => ApiError::new(ErrorKind::Unavailable, text).retry_after(SOON),
        TextError::NoChatTemplate => {
            ApiError::field("messages", "the model has no chat template; use /v1/completions with a prompt")
        }
        TextError::StopString { .. } => ApiError::field("stop", text),
        TextError::ReservedArgument { .. } => ApiError::field("chat_template_kwargs", text),
        TextError::UnknownToken { .. } => ApiError::new(ErrorKind::Invalid, text),
        TextError::NoDefaultTemplate { .. }
        | TextError::Template { .. }
        | TextError::Refused { .. }
        | TextError::TemplateTooSlow { .. }
        | TextError::TemplateOutput { .. }
        | TextError::TemplateMemory { .. }
        | TextError::TooNested { .. }
        | TextError::Continuation { .. } => ApiError::field("messages", text),
    }
}

impl From<RunError> for ApiError {
    fn from(error: RunError) -> Self {
        let text = error.to_string();
        match error {
            RunError::QueueFull { .. } => Self::new(ErrorKind::RateLimited, text).retry_after(SOON),
            RunError::TooLong { .. } | RunError::Invalid(_) => Self::new(ErrorKind::Invalid, text),
            RunError::DeadlineExceeded => Self::new(ErrorKind::Deadline, text).retry_after(SOON),
            RunError::Cancelled => Self::new(ErrorKind::Cancelled, text).retry_after(SOON),
            RunError::Unavailable(_) => Self::new(ErrorKind::Unavailable, text).retry_after(SOON),
            RunError::Failed(reason) => {
                // The reason is for the operator: it may tell of paths and devices.
                tracing::error!(%reason, "a request failed");
                Self::new(ErrorKind::Internal, "the model failed on this request; the node's log says why")
            }
        }
    }
}

impl ApiError {
    /// Why no grammar could be made; `format` is the field that asked for one.
    pub(crate) fn grammar(error: AnswerGrammarError, format: &str) -> Self {
        let field = match error {
            AnswerGrammarError::NoToolCalls => "tools",
            AnswerGrammarError::Messages
            | AnswerGrammarError::WholeAnswer
            | AnswerGrammarError::Schema(_) => format,
        };
        Self::field(field, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_keep_the_inside_to_themselves() {
        let error = ApiError::from(RunError::Failed("/Users/me/model.safetensors is gone".into()));
        assert_eq!(error.kind, ErrorKind::Internal);
        assert!(!error.message.contains("/Users"), "{}", error.message);
    }
}
