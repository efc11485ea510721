//! The gate at every rpc: every method of the public services with what it needs, and what becomes of a call's API key.
//!
//! Who may connect is decided by keys of connections ([`crate::access`]). A call may carry an API key besides, as `authorization: Bearer
//! KEY`: for people who share a connection's key, or a program that asks for others. Such a call may do no more than its key.

use crate::caller::Caller;
use crate::error::ApiError;
use crate::gate::{Access, Gate};
use crate::inference::status;
use crate::metrics::{Metrics, Rejection};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use mlxnode_compute::TraceContext;
use std::sync::Arc;
use std::time::Instant;
use tonic::Status;
use tonic::service::Routes;

/// One method that clients may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rpc {
    /// `/package.Service/Method`
    pub path: &'static str,
    /// What a key has to be for it.
    pub access: Access,
}

/// Every method of the services in [`crate::public_routes`]. What is not here is not served to calls that carry a key; a test holds the
/// table to the descriptors.
pub const RPCS: &[Rpc] = &[
    user("/mlxnode.v1.Inference/Generate"),
    user("/mlxnode.v1.Inference/GenerateBatch"),
    user("/mlxnode.v1.Inference/Embed"),
    user("/mlxnode.v1.Inference/Tokenize"),
    user("/mlxnode.v1.Inference/Detokenize"),
    user("/mlxnode.v1.Inference/RenderChat"),
    user("/mlxnode.v1.Models/List"),
    user("/mlxnode.v1.Models/Watch"),
    admin("/mlxnode.v1.Models/Plan"),
    admin("/mlxnode.v1.Models/Load"),
    admin("/mlxnode.v1.Models/Unload"),
    admin("/mlxnode.v1.Models/LoadAdapter"),
    admin("/mlxnode.v1.Models/UnloadAdapter"),
    admin("/mlxnode.v1.Cluster/Status"),
    admin("/mlxnode.v1.Cluster/Watch"),
    admin("/mlxnode.v1.Cluster/Figures"),
    admin("/mlxnode.v1.Cluster/Invite"),
    admin("/mlxnode.v1.Cluster/Forget"),
    admin("/mlxnode.v1.Cluster/Leave"),
    admin("/mlxnode.v1.Keys/Create"),
    admin("/mlxnode.v1.Keys/List"),
    admin("/mlxnode.v1.Keys/Revoke"),
    admin("/mlxnode.v1.Jobs/Upload"),
    admin("/mlxnode.v1.Jobs/Uploaded"),
    admin("/mlxnode.v1.Jobs/Submit"),
    admin("/mlxnode.v1.Jobs/List"),
    admin("/mlxnode.v1.Jobs/Get"),
    admin("/mlxnode.v1.Jobs/Watch"),
    admin("/mlxnode.v1.Jobs/Logs"),
    admin("/mlxnode.v1.Jobs/Cancel"),
    admin("/mlxnode.v1.Jobs/Pause"),
    admin("/mlxnode.v1.Jobs/Resume"),
    admin("/mlxnode.v1.Jobs/Publish"),
    admin("/mlxnode.v1.Jobs/Download"),
    open("/grpc.health.v1.Health/Check"),
    open("/grpc.health.v1.Health/Watch"),
    open("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
    open("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
];

const fn user(path: &'static str) -> Rpc {
    Rpc { path, access: Access::User }
}

const fn admin(path: &'static str) -> Rpc {
    Rpc { path, access: Access::Admin }
}

const fn open(path: &'static str) -> Rpc {
    Rpc { path, access: Access::Open }
}

/// The only scheme.
const BEARER: &str = "bearer";

/// What stands in front of the services.
#[derive(Clone)]
struct Entrance {
    gate: Gate,
    metrics: Arc<Metrics>,
}

/// The routes behind the gate.
pub(crate) fn guarded(routes: Routes, gate: Gate, metrics: Arc<Metrics>) -> Routes {
    let entrance = Entrance { gate, metrics };
    Routes::from(routes.into_axum_router().layer(middleware::from_fn_with_state(entrance, check)))
}

async fn check(State(entrance): State<Entrance>, mut request: Request, next: Next) -> Response {
    if !is_grpc(request.headers()) {
        return StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response(); // as the protocol wants it
    }
    let presented = presented_key(request.headers());
    let rpc = RPCS.iter().find(|rpc| rpc.path == request.uri().path());
    // Whoever brings a key may call what the table lists; all else is for no key.
    let access = rpc.map_or(Access::Admin, |rpc| rpc.access);
    match entrance.gate.narrow(access, presented.as_deref(), Instant::now()) {
        Ok(pass) => {
            let trace = request
                .headers()
                .get("traceparent")
                .and_then(|text| TraceContext::parse(text.to_str().ok()?));
            let tenant = pass.key.as_ref().map(|key| key.tenant()).unwrap_or_default();
            request.extensions_mut().insert(Caller { tenant, key: pass.key, trace });
            next.run(request).await
        }
        Err(denied) => {
            if let Some(reason) = Rejection::of(&denied) {
                entrance.metrics.rejected(reason);
            }
            refusal(status(&ApiError::from(denied)))
        }
    }
}

/// `application/grpc`, with or without how messages are written.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.strip_prefix("application/grpc").is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
}

fn refusal(status: Status) -> Response {
    let (parts, ()) = status.into_http::<()>().into_parts();
    Response::from_parts(parts, axum::body::Body::empty())
}

/// `authorization: Bearer KEY`. A header that holds something else is a key that is wrong, and so are two headers.
fn presented_key(headers: &HeaderMap) -> Option<String> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next()?.to_str().unwrap_or_default();
    if values.next().is_some() {
        return Some(String::new());
    }
    let (scheme, key) = value.split_once(' ').unwrap_or((value, ""));
    Some(if scheme.eq_ignore_ascii_case(BEARER) { key.trim().to_owned() } else { String::new() })
}

/// Who calls, for the services.
pub(crate) fn caller<T>(request: &tonic::Request<T>) -> Caller {
    request.extensions().get::<Caller>().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn a_key_is_presented_in_one_way_only() {
        let cases: [(&[&'static str], Option<&str>); 6] = [
            (&[], None),
            (&["Bearer mlx-1"], Some("mlx-1")),
            (&["bearer  mlx-1 "], Some("mlx-1")),
            (&["Basic bWx4"], Some("")),
            (&["mlx-1"], Some("")),
            (&["Bearer mlx-1", "Bearer mlx-2"], Some("")),
        ];
        for (values, expected) in cases {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_static(value));
            }
            assert_eq!(presented_key(&headers).as_deref(), expected, "{values:?}");
        }
    }
}
