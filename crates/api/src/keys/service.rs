//! `Keys`: decisions are the coordinator's; the list is known on every node.

use super::{KeysView, wire};
use crate::models::wire::status;
use crate::route::{CoordinatorRoute, Route, forwarded, not_answered};
use mlxnode_proto::v1::keys_client::KeysClient;
use mlxnode_proto::v1::keys_server::Keys;
use mlxnode_proto::v1::{
    CreateKeyRequest, CreateKeyResponse, ListKeysRequest, ListKeysResponse, RevokeKeyRequest,
    RevokeKeyResponse,
};
use std::sync::Arc;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// The service on one node.
pub struct KeysService {
    route: Arc<dyn CoordinatorRoute>,
    keys: watch::Receiver<KeysView>,
}

impl KeysService {
    /// Serves what this node knows and hands decisions to the coordinator.
    pub fn new(route: Arc<dyn CoordinatorRoute>, keys: watch::Receiver<KeysView>) -> Self {
        Self { route, keys }
    }
}

#[tonic::async_trait]
impl Keys for KeysService {
    async fn create(
        &self,
        request: Request<CreateKeyRequest>,
    ) -> Result<Response<CreateKeyResponse>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                KeysClient::new(channel).create(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let key = request.into_inner().key;
                let key = key.ok_or_else(|| Status::invalid_argument("key is missing"))?;
                let (text, entry) = coordinator.create_key(wire::wish(key)?).await.map_err(status)?;
                Ok(Response::new(CreateKeyResponse {
                    key: Some(wire::key_to_wire(&entry)),
                    text: text.reveal().to_owned(),
                }))
            }
        }
    }

    async fn list(&self, _request: Request<ListKeysRequest>) -> Result<Response<ListKeysResponse>, Status> {
        let view = self.keys.borrow();
        if !view.is_known {
            return Err(Status::unavailable(
                "the coordinator has not told this node the keys yet; see `mlxnode status` and try again in a moment",
            ));
        }
        Ok(Response::new(ListKeysResponse { keys: view.keys.iter().map(wire::key_to_wire).collect() }))
    }

    async fn revoke(
        &self,
        request: Request<RevokeKeyRequest>,
    ) -> Result<Response<RevokeKeyResponse>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                KeysClient::new(channel).revoke(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                coordinator.revoke_key(request.into_inner().name).await.map_err(status)?;
                Ok(Response::new(RevokeKeyResponse {}))
            }
        }
    }
}
