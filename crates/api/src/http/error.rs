//! What a client hears when something is wrong, in the shape that its library expects.

use crate::error::{ApiError, ErrorKind};
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

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
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NoRoute | Self::NoModel | Self::NotFound => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::Conflict => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable | Self::Deadline | Self::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
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
            Self::NotFound => ("invalid_request_error", Some("not_found")),
            Self::Method => ("invalid_request_error", Some("method_not_allowed")),
            Self::TooSlow => ("invalid_request_error", Some("request_timeout")),
            Self::Conflict => ("invalid_request_error", Some("conflict")),
            Self::TooLarge => ("invalid_request_error", Some("request_too_large")),
            Self::RateLimited => ("rate_limit_exceeded", Some("rate_limit_exceeded")),
            Self::Internal => ("server_error", None),
            Self::Unavailable | Self::Deadline | Self::Cancelled => {
                ("server_error", Some("service_unavailable"))
            }
        }
    }

    /// Anthropic's `type`.
    fn anthropic(self) -> &'static str {
        match self {
            Self::Invalid | Self::Method | Self::TooSlow | Self::Conflict => "invalid_request_error",
            Self::Unauthorized => "authentication_error",
            Self::Forbidden => "permission_error",
            Self::NoRoute | Self::NoModel | Self::NotFound => "not_found_error",
            Self::TooLarge => "request_too_large",
            Self::RateLimited => "rate_limit_error",
            Self::Internal => "api_error",
            Self::Unavailable | Self::Deadline | Self::Cancelled => "overloaded_error",
        }
    }
}

impl ApiError {
    /// The body of the answer; also the last event of a stream that breaks.
    pub fn body(&self, dialect: Dialect) -> Value {
        match dialect {
            Dialect::OpenAi => {
                let (kind, code) = self.kind.openai();
                let code = self.code.or(code);
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

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_coordinator::scheduler::RunError;

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
}
