//! The gate at every route: who may call it, what the key may use still, and for whom the request is.
//!
//! The layer is put around each route of the table, with what the table says that it needs; there is no route without it.

use crate::gate::{Access, Allowance, Balance, Denied};
use crate::http::{ApiError, Caller, ErrorKind, HttpServices};
use crate::metrics::Rejection;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use mlxnode_compute::TraceContext;
use std::time::{Duration, Instant};

/// What stands at one route.
#[derive(Clone)]
pub(super) struct Entrance {
    pub(super) services: HttpServices,
    pub(super) access: Access,
    /// As the table writes it.
    pub(super) path: &'static str,
}

/// Anthropic's clients send their key in this header.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Lets a request through, or answers it.
pub(super) async fn check(State(entrance): State<Entrance>, mut request: Request, next: Next) -> Response {
    let Entrance { services, access, path } = entrance;
    let presented = presented_key(request.headers());
    let admitted = services.gate.admit(access, presented.as_deref(), Instant::now());
    let (mut response, balance) = match admitted {
        Ok(pass) => {
            let trace = request.extensions().get::<TraceContext>().copied();
            let tenant = pass.key.as_ref().map(|key| key.tenant()).unwrap_or_default();
            let is_limited = pass.key.as_ref().is_some_and(|key| !key.models.is_empty());
            request.extensions_mut().insert(Caller { tenant, key: pass.key, trace });
            let response = next.run(request).await;
            let response = if is_limited { without_names(response) } else { response };
            (response, pass.balance)
        }
        Err(denied) => {
            let (error, reason, balance) = refusal(denied);
            if let Some(reason) = reason {
                services.metrics.rejected(reason);
            }
            (error.into_response(), balance)
        }
    };
    add_limits(response.headers_mut(), &balance);
    services.metrics.answered(path, response.status().as_u16());
    response
}

/// `Authorization: Bearer KEY`, or `x-api-key: KEY`. A header that holds something else is a key that is wrong.
fn presented_key(headers: &HeaderMap) -> Option<String> {
    let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let value = text(value);
        let (scheme, key) = value.split_once(' ').unwrap_or((&value, ""));
        let is_bearer = scheme.eq_ignore_ascii_case("bearer");
        return Some(if is_bearer { key.trim().to_owned() } else { String::new() });
    }
    headers.get(X_API_KEY).map(|value| text(value).trim().to_owned())
}

fn refusal(denied: Denied) -> (ApiError, Option<Rejection>, Balance) {
    let reason = Rejection::of(&denied);
    let balance = match &denied {
        Denied::Exhausted(exhausted) => exhausted.balance,
        _ => Balance::default(),
    };
    (denied.into(), reason, balance)
}

/// A key that is held to some models does not learn the names of the others.
fn without_names(response: Response) -> Response {
    match response.extensions().get::<ApiError>() {
        Some(error) if matches!(error.kind, ErrorKind::Invalid | ErrorKind::NoModel) => {
            let told = error.clone().without_names();
            if told == *error { response } else { told.into_response() }
        }
        _ => response,
    }
}

/// The headers by which OpenAI's clients pace themselves.
fn add_limits(headers: &mut HeaderMap, balance: &Balance) {
    let names = [
        (
            balance.requests,
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
        ),
        (
            balance.tokens,
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
        ),
    ];
    for (allowance, names) in names {
        let Some(Allowance { limit, remaining, reset }) = allowance else { continue };
        let values = [limit.to_string(), remaining.to_string(), span(reset)];
        for (name, value) in names.into_iter().zip(values) {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        }
    }
}

/// "0s", "20ms", "1.5s", "6m0s".
fn span(time: Duration) -> String {
    let millis = time.as_millis();
    match millis {
        0 => "0s".to_owned(),
        1..1000 => format!("{millis}ms"),
        1000..60_000 => format!("{}s", millis as f64 / 1000.0),
        _ => format!("{}m{}s", millis / 60_000, millis % 60_000 / 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_the_headers_of_either_dialect() {
        type Case = (&'static [(&'static str, &'static str)], Option<&'static str>);
        let cases: [Case; 8] = [
            (&[], None),
            (&[("authorization", "Bearer mlx-1")], Some("mlx-1")),
            (&[("authorization", "bearer  mlx-1 ")], Some("mlx-1")),
            (&[("authorization", "Basic bWx4")], Some("")),
            (&[("authorization", "mlx-1")], Some("")),
            (&[("authorization", "é")], Some("")),
            (&[("x-api-key", "mlx-2")], Some("mlx-2")),
            (&[("x-api-key", "mlx-2"), ("authorization", "Bearer mlx-1")], Some("mlx-1")),
        ];
        for (pairs, expected) in cases {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
                headers.insert(HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
            }
            assert_eq!(presented_key(&headers).as_deref(), expected, "{pairs:?}");
        }
    }

    #[test]
    fn spans_are_written_as_openai_writes_them() {
        let cases =
            [(0, "0s"), (20, "20ms"), (1000, "1s"), (1500, "1.5s"), (60_000, "1m0s"), (361_000, "6m1s")];
        for (millis, expected) in cases {
            assert_eq!(span(Duration::from_millis(millis)), expected);
        }
    }
}
