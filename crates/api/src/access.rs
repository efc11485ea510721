//! Who may call what. Deny by default: every service names the roles that it serves.

use mlxnode_cluster::{PeerKey, Role};
use tonic::{Request, Status};

/// Local clients and the nodes of the cluster (which hand on what their own clients asked).
pub const PUBLIC: &[Role] = &[Role::Own, Role::Client, Role::Node];
/// Those who administer the cluster: at a terminal on one of its machines (nodes hand on what their own clients asked). Whoever can read
/// a node's data directory is one.
pub const ADMINS: &[Role] = PUBLIC;
/// Nodes only.
pub const NODES: &[Role] = &[Role::Node];

/// Lets a call through when the key behind the connection was admitted with one of these roles.
///
/// # Errors
/// `PERMISSION_DENIED` otherwise, also when the connection carries no key at all.
pub fn require<T>(request: &Request<T>, roles: &[Role]) -> Result<PeerKey, Status> {
    match request.extensions().get::<PeerKey>() {
        Some(peer) if roles.contains(&peer.role) => Ok(*peer),
        _ => Err(Status::permission_denied("this key may not call this service")),
    }
}

/// An interceptor that requires one of `roles`, for a whole service.
pub fn only(roles: &'static [Role]) -> impl FnMut(Request<()>) -> Result<Request<()>, Status> + Clone {
    move |request| require(&request, roles).map(|_| request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_cluster::KeyPin;

    #[test]
    fn a_call_without_a_fitting_key_is_denied() {
        let with = |role| {
            let mut request = Request::new(());
            request.extensions_mut().insert(PeerKey { pin: KeyPin::from_bytes([1; 32]), role });
            request
        };
        assert!(require(&with(Role::Client), PUBLIC).is_ok());
        assert!(require(&with(Role::Client), NODES).is_err());
        assert!(require(&with(Role::Neighbour), PUBLIC).is_err());
        assert!(require(&Request::new(()), PUBLIC).is_err());
    }
}
