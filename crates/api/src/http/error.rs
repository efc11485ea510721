//! What a client hears when something is wrong, in the shape that its library expects.

use crate::front::FrontError;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mlxnode_coordinator::requests::RequestError;
use mlxnode_coordinator::scheduler::RunError;
use mlxnode_text::TextError;
use serde_json::{Value, json};
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
}

/// Whose client it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error": {"message", "type", "param", "code"}}`
    OpenAi,
    /// `{"type": "error", "error": {"type", "message"}}`
    Anthropic,
}

impl Dialect {
    /// By the path of the request.
    pub fn of_path(path: &str) -> Self {
        let is_messages = path == "/v1/messages" || path.starts_with("/v1/messages/");
        if is_messages { Self::Anthropic } else { Self::OpenAi }
    }
}

impl ErrorKind {
    /// Its status.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NoRoute | Self::NoModel => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::Conflict => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// OpenAI's `type` and `code`.
    fn openai(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Invalid => ("invalid_request_error", None),
            Self::Unauthorized => ("invalid_request_error", Some("invalid_api_key")),
            Self::Forbidden => ("invalid_request_error", Some("forbidden")),
            Self::NoRoute => ("invalid_request_error", Some("unknown_url")),
            Self::NoModel => ("invalid_request_error", Some("model_not_found")),
            Self::Method => ("invalid_request_error", Some("method_not_allowed")),
            Self::TooSlow => ("invalid_request_error", Some("request_timeout")),
            Self::Conflict => ("invalid_request_error", Some("conflict")),
            Self::TooLarge => ("invalid_request_error", Some("request_too_large")),
            Self::RateLimited => ("rate_limit_exceeded", Some("rate_limit_exceeded")),
            Self::Internal => ("server_error", None),
            Self::Unavailable => ("server_error", Some("service_unavailable")),
        }
    }

    /// Anthropic's `type`.
    fn anthropic(self) -> &'static str {
        match self {
            Self::Invalid | Self::Method | Self::TooSlow | Self::Conflict => "invalid_request_error",
            Self::Unauthorized => "authentication_error",
            Self::Forbidden => "permission_error",
            Self::NoRoute | Self::NoModel => "not_found_error",
            Self::TooLarge => "request_too_large",
            Self::RateLimited => "rate_limit_error",
            Self::Internal => "api_error",
            Self::Unavailable => "overloaded_error",
        }
    }
}

impl ApiError {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, retry_after: None }
    }

    /// A field is wrong: 400.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(ErrorKind::Invalid, message) }
    }

    /// With the time after which it is worth trying again.
    #[must_use]
    pub fn retry_after(self, time: Duration) -> Self {
        Self { retry_after: Some(time), ..self }
    }

    /// The body of the answer; also the last event of a stream that breaks.
    pub fn body(&self, dialect: Dialect) -> Value {
        match dialect {
            Dialect::OpenAi => {
                let (kind, code) = self.kind.openai();
                json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": code}})
            }
            Dialect::Anthropic => {
                let message = match &self.param {
                    Some(param) if !self.message.contains(param.as_str()) => {
                        format!("{param}: {}", self.message)
                    }
                    _ => self.message.clone(),
                };
                json!({"type": "error", "error": {"type": self.kind.anthropic(), "message": message}})
            }
        }
    }

    /// The whole answer. The error itself travels with it, so that a layer outside may count it.
    pub fn respond(self, dialect: Dialect) -> Response {
        let mut response = (self.kind.status(), Json(self.body(dialect))).into_response();
        if let Some(time) = self.retry_after {
            let seconds = time.as_millis().div_ceil(1000).max(1);
            if let Ok(value) = HeaderValue::from_str(&seconds.to_string()) {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
        }
        if self.kind == ErrorKind::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(Dialect::OpenAi)
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
            FrontError::Busy { retry_after, .. } => {
                Self::new(ErrorKind::RateLimited, text).retry_after(retry_after)
            }
            FrontError::BrokenAdapter { .. } => Self::new(ErrorKind::Unavailable, text).retry_after(SOON),
            FrontError::NotReady { .. } => Self::new(ErrorKind::Unavailable, text).retry_after(SOON),
            FrontError::Request(error) => {
                Self { param: request_param(&error), ..Self::new(ErrorKind::Invalid, text) }
            }
            FrontError::Text(error) => text_error(&error),
            FrontError::Run(error) => error.into(),
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
            RunError::DeadlineExceeded | RunError::Cancelled | RunError::Unavailable(_) => {
                Self::new(ErrorKind::Unavailable, text).retry_after(SOON)
            }
            RunError::Failed(reason) => {
                // The reason is for the operator: it may tell of paths and devices.
                tracing::error!(%reason, "a request failed");
                Self::new(ErrorKind::Internal, "the model failed on this request; the node's log says why")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_dialect_has_its_shape() {
        let error = ApiError::field("top_p", "top_p is 2, but must be between 0 and 1");
        let openai = json!({"error": {
            "message": "top_p is 2, but must be between 0 and 1", "type": "invalid_request_error", "param": "top_p",
            "code": null
        }});
        assert_eq!(error.body(Dialect::OpenAi), openai);
        let anthropic = json!({"type": "error", "error": {
            "type": "invalid_request_error", "message": "top_p is 2, but must be between 0 and 1"
        }});
        assert_eq!(error.body(Dialect::Anthropic), anthropic);
        assert_eq!(Dialect::of_path("/v1/messages/count_tokens"), Dialect::Anthropic);
        assert_eq!(Dialect::of_path("/v1/messagesx"), Dialect::OpenAi);
    }

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let response = ApiError::from(RunError::QueueFull { queued: 9, tokens: 99 }).into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }

    #[test]
    fn failures_keep_the_inside_to_themselves() {
        let error = ApiError::from(RunError::Failed("/Users/me/model.safetensors is gone".into()));
        assert_eq!(error.kind, ErrorKind::Internal);
        assert!(!error.message.contains("/Users"), "{}", error.message);
    }
}
