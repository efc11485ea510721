//! Errors as gRPC says them: a code, a sentence, and details that programs read (google.rpc's ErrorInfo, BadRequest and RetryInfo).

use crate::error::{ApiError, ErrorKind};
use std::collections::HashMap;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Whose reasons these are.
const DOMAIN: &str = "mlxnode";

/// The status that tells a client what went wrong.
pub(crate) fn status(error: &ApiError) -> Status {
    let mut details = ErrorDetails::with_error_info(reason(error.kind), DOMAIN, HashMap::new());
    if let Some(field) = field(error) {
        details.add_bad_request_violation(field, error.message.clone());
    }
    if let Some(wait) = error.retry_after {
        details.set_retry_info(Some(wait));
    }
    Status::with_error_details(code(error.kind), error.message.clone(), details)
}

/// Its code.
pub(super) fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Unauthorized => Code::Unauthenticated,
        ErrorKind::Forbidden => Code::PermissionDenied,
        ErrorKind::NoModel | ErrorKind::NotFound => Code::NotFound,
        ErrorKind::NoRoute | ErrorKind::Method => Code::Unimplemented,
        ErrorKind::TooSlow | ErrorKind::Deadline => Code::DeadlineExceeded,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::Conflict => Code::FailedPrecondition,
        ErrorKind::TooLarge | ErrorKind::RateLimited => Code::ResourceExhausted,
        ErrorKind::Internal => Code::Internal,
        ErrorKind::Unavailable => Code::Unavailable,
    }
}

fn reason(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Invalid => "INVALID_REQUEST",
        ErrorKind::Unauthorized => "INVALID_API_KEY",
        ErrorKind::Forbidden => "FORBIDDEN",
        ErrorKind::NoModel => "MODEL_NOT_FOUND",
        ErrorKind::NotFound => "NOT_FOUND",
        ErrorKind::NoRoute | ErrorKind::Method => "UNKNOWN_METHOD",
        ErrorKind::TooSlow | ErrorKind::Deadline => "DEADLINE_EXCEEDED",
        ErrorKind::Cancelled => "CANCELLED",
        ErrorKind::Conflict => "CONFLICT",
        ErrorKind::TooLarge => "REQUEST_TOO_LARGE",
        ErrorKind::RateLimited => "RATE_LIMIT_EXCEEDED",
        ErrorKind::Internal => "SERVER_ERROR",
        ErrorKind::Unavailable => "UNAVAILABLE",
    }
}

/// The field that is wrong, by its path in the request.
pub(super) fn field(error: &ApiError) -> Option<String> {
    let param = error.param.as_deref()?;
    let (first, rest) = param.split_at(param.find(['.', '[']).unwrap_or(param.len()));
    let place = match first {
        "temperature"
        | "top_p"
        | "min_p"
        | "min_tokens_to_keep"
        | "top_k"
        | "xtc_probability"
        | "xtc_threshold"
        | "seed"
        | "logit_bias"
        | "repetition_penalty"
        | "repetition_context_size"
        | "presence_penalty"
        | "presence_context_size"
        | "frequency_penalty"
        | "frequency_context_size" => format!("sampling.{first}"),
        "messages" | "tool_choice" => format!("chat.{first}"),
        "tools" => "chat.tools_json".to_owned(),
        "chat_template_kwargs" => "chat.template_arguments_json".to_owned(),
        "grammar" => "format".to_owned(),
        "n" => "samples".to_owned(),
        "input" => "inputs".to_owned(),
        other => other.to_owned(),
    };
    Some(format!("{place}{rest}"))
}

/// How long to wait, in seconds; 0 when that is not known.
pub(super) fn retry_seconds(error: &ApiError) -> f64 {
    error.retry_after.unwrap_or(Duration::ZERO).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_find_field_and_wait_in_the_details() {
        let cases = [
            ("top_p", "sampling.top_p"),
            ("messages[2].content", "chat.messages[2].content"),
            ("tools[0].function.name", "chat.tools_json[0].function.name"),
            ("stop", "stop"),
        ];
        for (param, expected) in cases {
            let status = status(&ApiError::field(param, "wrong"));
            assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "wrong"));
            let details = status.get_error_details();
            let violation = &details.bad_request().unwrap().field_violations[0];
            assert_eq!((violation.field.as_str(), violation.description.as_str()), (expected, "wrong"));
        }
        let busy = ApiError::new(ErrorKind::RateLimited, "full").retry_after(Duration::from_secs(7));
        let details = status(&busy).get_error_details();
        assert_eq!(details.retry_info().unwrap().retry_delay, Some(Duration::from_secs(7)));
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("RATE_LIMIT_EXCEEDED", DOMAIN));
        assert!(details.bad_request().is_none());
    }
}
