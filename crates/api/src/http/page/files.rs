//! The page: plain files, part of the program, so that it needs no network and no build.
//!
//! It says nothing by itself, so everybody may have it; what it shows comes from endpoints that ask for keys. Its policy lets the browser run
//! and load what this node serves and nothing else, so that not even a model's answer could bring in something foreign.

use crate::http::{ApiError, ErrorKind};
use axum::body::Body;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// A file of the page.
struct File {
    name: &'static str,
    kind: &'static str,
    text: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const IMAGE: &str = "image/svg+xml";

macro_rules! files {
    ($($name:literal: $kind:ident),* $(,)?) => {
        [$(File { name: $name, kind: $kind, text: include_str!(concat!("../../../page/", $name)) }),*]
    };
}

const INDEX: File = File { name: "", kind: HTML, text: include_str!("../../../page/index.html") };
const FILES: [File; 14] = files! {
    "style.css": STYLE,
    "icon.svg": IMAGE,
    "app.js": SCRIPT,
    "access.js": SCRIPT,
    "chat.js": SCRIPT,
    "cluster.js": SCRIPT,
    "dialogs.js": SCRIPT,
    "dom.js": SCRIPT,
    "jobs.js": SCRIPT,
    "map.js": SCRIPT,
    "markdown.js": SCRIPT,
    "models.js": SCRIPT,
    "training.js": SCRIPT,
    "words.js": SCRIPT,
};

/// What a browser may do with the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// `/`
pub(in crate::http) async fn index(headers: HeaderMap) -> Response {
    respond(&INDEX, &headers)
}

/// `/page/NAME`
pub(in crate::http) async fn file(
    name: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::new(ErrorKind::Invalid, error.body_text()))?;
    match FILES.iter().find(|file| file.name == name) {
        Some(file) => Ok(respond(file, &headers)),
        None => {
            let name: String = name.chars().take(100).collect();
            Err(ApiError::new(ErrorKind::NoRoute, format!("the page has no file {name:?}")))
        }
    }
}

/// The file, or that the browser has it already.
fn respond(file: &File, asked: &HeaderMap) -> Response {
    let tag = tag(file.text);
    let known = asked.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let is_known =
        known.flat_map(|tags| tags.split(',')).any(|known| known.trim().trim_start_matches("W/") == tag);
    let mut response = Response::new(if is_known { Body::empty() } else { Body::from(file.text) });
    if is_known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let headers = response.headers_mut();
    let fixed: [(HeaderName, &'static str); 6] = [
        (header::CONTENT_TYPE, file.kind),
        // Kept, and asked about each time: a node that was updated brings its own page.
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    response
}

/// Changes with the text. Nobody attacks it: it only has to differ between releases.
fn tag(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the page asks for is there, and nothing of it comes from elsewhere or would need a weaker policy.
    #[test]
    fn the_page_is_whole_and_needs_nobody_else() {
        for file in FILES.iter().chain([&INDEX]) {
            for quote in ['"', '\''] {
                for piece in file.text.split(quote) {
                    let asked = piece.strip_prefix("/page/").or_else(|| piece.strip_prefix("./"));
                    if let Some(name) = asked.filter(|name| name.contains('.') && !name.contains(' ')) {
                        assert!(FILES.iter().any(|file| file.name == name), "{} asks for {name}", file.name);
                    }
                }
            }
            for word in
                ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=\""]
            {
                assert!(!file.text.contains(word), "{:?} has {word}", file.name);
            }
            let foreign = file.text.replace("http://www.w3.org/", "");
            assert!(!foreign.contains("http://") && !foreign.contains("https://"), "{:?}", file.name);
        }
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("page");
        let lying = std::fs::read_dir(folder).unwrap().count();
        assert_eq!(lying, FILES.len() + 1, "every file of the folder is served");
    }
}
