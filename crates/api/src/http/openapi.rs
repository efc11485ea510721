//! `/openapi.json`: the endpoints and their fields, for programs. The document lies beside this file; a test holds it to the routes and to
//! what the endpoints take.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

/// The document (OpenAPI 3.1).
pub(super) const DOCUMENT: &str = include_str!("openapi.json");

/// The handler.
pub(super) async fn document() -> Response {
    let kind = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    ([kind], DOCUMENT).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::routes::routes;
    use serde_json::Value;
    use std::collections::BTreeSet;

    #[test]
    fn the_document_has_every_route_and_no_other() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let mut documented = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            documented
                .extend(methods.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())));
        }
        let served: BTreeSet<(String, String)> = routes()
            .into_iter()
            .map(|route| (route.path.replace("{*", "{"), route.method.as_str().to_lowercase()))
            .collect();
        assert_eq!(documented, served);
    }
}
