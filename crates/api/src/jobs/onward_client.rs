//! A call that another node's coordinator answers, and for whom it is there.

use crate::route::{FORWARDED, forwarded};
use crate::rpc::caller;
use mlxnode_cluster::{PeerKey, Role};
use mlxnode_proto::v1::jobs_client::JobsClient;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// The longest answer about jobs: 256 of them in a list, each with what it reads, saved and published.
const LARGEST_ANSWER: usize = 32 << 20;
/// Name of the API key that a call came with, from the node that took it.
const KEY_NAME: &str = "mlxnode-key-name-bin";
/// Longest name of a key, with room.
const MAX_KEY_NAME: usize = 256;

/// A client that takes the longest answers.
pub fn jobs_client(channel: Channel) -> JobsClient<Channel> {
    JobsClient::new(channel).max_decoding_message_size(LARGEST_ANSWER)
}

/// The call for the coordinator, with the name of the key that it came with.
pub(super) fn onward<T>(request: Request<T>) -> Result<Request<T>, Status> {
    let owner = whose(&request);
    let mut onward = forwarded(request)?;
    if !owner.is_empty() {
        onward.metadata_mut().insert_bin(KEY_NAME, MetadataValue::from_bytes(owner.as_bytes()));
    }
    Ok(onward)
}

/// Was it handed on by another node, which looked at it before?
pub(super) fn is_handed_on<T>(request: &Request<T>) -> bool {
    is_from_node(request) && request.metadata().contains_key(FORWARDED)
}

fn is_from_node<T>(request: &Request<T>) -> bool {
    request.extensions().get::<PeerKey>().is_some_and(|peer| peer.role == Role::Node)
}

/// Name of the key that the call came with, to this node or to the one that handed it on; empty: none. Only nodes are believed.
pub(super) fn whose<T>(request: &Request<T>) -> String {
    if let Some(key) = caller(request).key {
        return key.name.clone();
    }
    let told = request.metadata().get_bin(KEY_NAME).filter(|_| is_handed_on(request));
    let name = told.and_then(|name| String::from_utf8(name.to_bytes().ok()?.to_vec()).ok());
    name.filter(|name| name.len() <= MAX_KEY_NAME).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caller::Caller;
    use crate::keys::{KeyEntry, KeyRole};
    use mlxnode_cluster::KeyPin;
    use mlxnode_coordinator::keys::{KeyLimits, KeyText};
    use std::sync::Arc;

    fn from(role: Role, request: Request<()>) -> Request<()> {
        let mut request = request;
        request.extensions_mut().insert(PeerKey { pin: KeyPin::from_bytes([1; 32]), role });
        request
    }

    fn with_key(name: &str) -> Request<()> {
        let entry = KeyEntry {
            name: name.into(),
            hash: KeyText::new(&[1; 32]).hash(),
            role: KeyRole::Admin,
            models: Vec::new(),
            limits: KeyLimits::default(),
            created_unix: 0,
        };
        let mut request = Request::new(());
        request.extensions_mut().insert(Caller { key: Some(Arc::new(entry)), ..Caller::default() });
        request
    }

    #[test]
    fn a_key_is_the_same_on_every_node_and_only_nodes_are_believed() {
        assert_eq!(whose(&from(Role::Client, with_key("ann"))), "ann");
        let handed = || onward(with_key("änn")).unwrap();
        assert_eq!(whose(&from(Role::Node, handed())), "änn");
        for role in [Role::Client, Role::Own, Role::Neighbour] {
            assert_eq!(whose(&from(role, handed())), "", "{role:?}");
        }
        assert_eq!(whose(&handed()), "", "without a connection's key");
        assert_eq!(whose(&onward(Request::new(())).unwrap()), "");
        assert!(is_handed_on(&from(Role::Node, handed())) && !is_handed_on(&from(Role::Client, handed())));
    }
}
