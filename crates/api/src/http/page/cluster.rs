//! `/api/v1/session`, `/api/v1/cluster`, `/api/v1/events`: who asks, and the cluster as it is now.

use super::control;
use crate::gate::Access;
use crate::http::events::{Gone, stream};
use crate::http::{ApiError, Caller, HttpServices};
use crate::picture::Picture;
use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use std::time::Duration;

/// Between two pictures.
const PERIOD: Duration = Duration::from_secs(1);

/// Who asks.
#[derive(Serialize)]
pub(in crate::http) struct Session {
    /// "user", "trainer" or "admin". Without a key, where none is asked for: "admin".
    role: &'static str,
    /// Name of the key; `null` without one.
    key: Option<String>,
    /// Release of mlxnode.
    version: &'static str,
}

pub(in crate::http) async fn session(caller: Caller) -> Json<Session> {
    let role = caller.key.as_ref().map_or("admin", |key| key.role.name());
    let key = caller.key.map(|key| key.name.clone());
    Json(Session { role, key, version: env!("CARGO_PKG_VERSION") })
}

/// Once.
pub(in crate::http) async fn cluster(
    State(services): State<HttpServices>,
    caller: Caller,
) -> Result<Json<Picture>, ApiError> {
    let control = control(&services)?;
    Ok(Json(control.cluster.picture().await.held_to(|model| caller.may_use(model))))
}

/// At once and then every second, until the client leaves, the node stops, or the key is revoked.
pub(in crate::http) async fn events(
    State(services): State<HttpServices>,
    caller: Caller,
) -> Result<Response, ApiError> {
    let cluster = control(&services)?.cluster.clone();
    Ok(stream(move |events| async move {
        while services.gate.admits_still(Access::Read, caller.key.as_deref()) {
            let picture = cluster.picture().await.held_to(|model| caller.may_use(model));
            events.named("cluster", &picture).await?;
            tokio::select! {
                () = services.stopping.cancelled() => break,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
        Ok::<(), Gone>(())
    }))
}
