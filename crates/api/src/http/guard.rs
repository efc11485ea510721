//! Who may ask from where.
//!
//! A web page can make the browser of somebody on this machine send requests to 127.0.0.1. Two things stop it: the name in `Host`
//! must be one of this node's (a page that rebinds its own name to this address brings its own name), and a page of another origin
//! is refused unless `--http-origin` allows it, in which case the browser is told so (CORS).

use crate::http::{ApiError, Dialect, ErrorKind};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use std::net::IpAddr;
use std::sync::Arc;

/// Names and origins that are let in.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// Lower case, without port. `*` lets every name in.
    hosts: Vec<String>,
    /// As browsers send them, such as `https://chat.example`. `*` lets every page in.
    origins: Vec<String>,
}

impl Guard {
    /// Lets in requests to these names besides the loopback's, and pages of these origins besides our own.
    pub fn new(hosts: impl IntoIterator<Item = String>, origins: impl IntoIterator<Item = String>) -> Self {
        Self {
            hosts: hosts.into_iter().map(|host| host.to_ascii_lowercase()).collect(),
            origins: origins
                .into_iter()
                .map(|origin| origin.trim_end_matches('/').to_ascii_lowercase())
                .collect(),
        }
    }

    fn knows_host(&self, authority: &str) -> bool {
        let Ok(authority) = authority.parse::<Authority>() else { return false };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
        let is_loopback =
            host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        is_loopback || self.hosts.iter().any(|known| known == "*" || host.eq_ignore_ascii_case(known))
    }

    /// Does the request come from a page of another origin, and is that allowed? `Ok(Some)`: allowed, and the browser has to be told.
    fn origin(&self, headers: &HeaderMap, host: &str) -> Result<Option<HeaderValue>, ApiError> {
        let Some(origin) = headers.get(header::ORIGIN) else {
            // Old browsers send no Origin with some requests, but say where they come from.
            return match headers.get("sec-fetch-site").map(HeaderValue::as_bytes) {
                Some(b"cross-site") => Err(foreign("another site")),
                _ => Ok(None),
            };
        };
        let text = origin.to_str().unwrap_or_default().to_ascii_lowercase();
        let own = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
        if own.is_some_and(|own| own.eq_ignore_ascii_case(host)) {
            return Ok(None);
        }
        match self.origins.iter().any(|known| known == "*" || *known == text) {
            true => Ok(Some(origin.clone())),
            false => Err(foreign(&text)),
        }
    }
}

fn foreign(origin: &str) -> ApiError {
    let origin: String = origin.chars().take(200).collect();
    ApiError::new(
        ErrorKind::Forbidden,
        format!("pages of {origin} may not use this node; `mlxnode join --http-origin ORIGIN` allows one"),
    )
}

/// Lets a request through, or answers it.
pub(super) async fn check(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let dialect = Dialect::of_path(request.uri().path());
    let host = match request.uri().authority() {
        Some(authority) => authority.as_str().to_owned(),
        None => {
            let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
            host.unwrap_or_default().to_owned()
        }
    };
    if !guard.knows_host(&host) {
        let host: String = host.chars().take(200).collect();
        let message = format!(
            "{host:?} is not a name of this node; ask it by its address, or start it with `mlxnode join --http-host NAME`"
        );
        return ApiError::new(ErrorKind::Forbidden, message).respond(dialect);
    }
    let origin = match guard.origin(request.headers(), &host) {
        Ok(origin) => origin,
        // A link that somebody follows to the page; it says nothing by itself.
        Err(_) if is_visit(&request) => None,
        Err(error) => return error.respond(dialect),
    };
    let Some(origin) = origin else { return next.run(request).await };
    let is_preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match is_preflight {
        false => next.run(request).await,
        true => {
            let asked = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            let headers = response.headers_mut();
            let methods = HeaderValue::from_static("GET, POST, DELETE");
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
            if let Some(asked) = asked {
                headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked);
            }
            response
        }
    };
    response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
    response
}

/// Does a person go to the web page, from wherever?
fn is_visit(request: &Request) -> bool {
    let navigates = request.headers().get("sec-fetch-mode").is_some_and(|mode| mode == "navigate");
    navigates && request.method() == Method::GET && request.uri().path() == "/"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_are_answered() {
        let guard = Guard::new(["Studio.local".to_owned(), "10.0.0.7".to_owned()], []);
        for host in [
            "localhost",
            "localhost:8080",
            "127.0.0.1:1",
            "[::1]:8080",
            "studio.local:8080",
            "STUDIO.LOCAL.",
            "10.0.0.7",
        ] {
            assert!(guard.knows_host(host), "{host}");
        }
        for host in
            ["", "evil.example", "localhost.evil.example", "10.0.0.8", "127.0.0.1.nip.io", "a b", "user@"]
        {
            assert!(!guard.knows_host(host), "{host}");
        }
        assert!(Guard::new(["*".to_owned()], []).knows_host("anything:80"));
    }

    #[test]
    fn pages_of_other_origins_are_refused_unless_allowed() {
        let guard = Guard::new([], ["https://chat.example/".to_owned()]);
        let ask = |name: &'static str, value: &'static str| {
            let headers = HeaderMap::from_iter([(
                header::HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )]);
            guard.origin(&headers, "localhost:8080")
        };
        assert_eq!(ask("origin", "http://localhost:8080"), Ok(None));
        assert_eq!(
            ask("origin", "https://chat.example"),
            Ok(Some(HeaderValue::from_static("https://chat.example")))
        );
        assert!(ask("origin", "http://localhost:3000").is_err());
        assert!(ask("origin", "null").is_err());
        assert!(ask("sec-fetch-site", "cross-site").is_err());
        assert_eq!(ask("sec-fetch-site", "same-origin"), Ok(None));
    }
}
