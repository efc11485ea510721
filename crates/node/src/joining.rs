//! How a node becomes a member: as it was before, by an invite, or of a cluster of its own.

use crate::data_dir::DataDir;
use crate::lookout::Lookout;
use crate::node::NodeError;
use crate::options::NodeOptions;
use mlxnode_cluster::{
    ClusterKey, Identity, InviteSecret, NodeFacts, Roster, RosterEntry, RosterStore, find_inviters,
};
use std::time::Duration;
use tracing::info;

/// How long to look for an open invite in the local network.
const LOOK_FOR_INVITERS: Duration = Duration::from_secs(15);
/// Makes this node a member: as it was, by invite, or of a cluster of its own; true when it made one.
pub(crate) async fn become_member(
    options: &NodeOptions,
    data_dir: &DataDir,
    identity: &Identity,
    roster: &RosterStore,
    lookout: &Lookout,
    facts: &NodeFacts,
) -> Result<bool, NodeError> {
    let invite = options.invite.as_deref().map(str::parse::<InviteSecret>).transpose()?;
    let member = roster.current().map(|signed| {
        let roster = signed.roster();
        (roster.cluster_name().to_owned(), roster.get(&identity.id()).is_some())
    });
    match (member, invite) {
        (Some((_, true)), None) => Ok(false),
        (Some((cluster, true)), Some(_)) => Err(NodeError::Member(cluster)),
        (Some((cluster, false)), None) => Err(NodeError::Removed(cluster)),
        (Some((_, false)), Some(secret)) => {
            roster.clear()?;
            data_dir.forget_cluster()?;
            join(options, identity, roster, lookout, facts, &secret).await.map(|()| false)
        }
        (None, Some(secret)) => {
            join(options, identity, roster, lookout, facts, &secret).await.map(|()| false)
        }
        (None, None) => {
            let key = ClusterKey::load_or_create(data_dir.root())?;
            let cluster_name = options.cluster_name.clone().unwrap_or_else(|| facts.name.clone());
            let founder = RosterEntry {
                node_id: identity.id(),
                name: facts.name.clone(),
                addresses: facts.addresses.clone(),
            };
            let signed = key.sign(Roster::found(&key, &cluster_name, founder)).map_err(NodeError::Found)?;
            roster.adopt(signed)?;
            Ok(true)
        }
    }
}

async fn join(
    options: &NodeOptions,
    identity: &Identity,
    roster: &RosterStore,
    lookout: &Lookout,
    facts: &NodeFacts,
    secret: &InviteSecret,
) -> Result<(), NodeError> {
    // A token knows where to go, and so does whoever names a peer.
    let knows_where = !options.peers.is_empty() || matches!(secret, InviteSecret::Token(_));
    let mut targets = options.peers.clone();
    if let (false, Some(mdns)) = (knows_where, lookout.mdns()) {
        info!("looking for an open invite in the local network");
        targets = find_inviters(mdns, LOOK_FOR_INVITERS).await;
    }
    let joined = mlxnode_cluster::join(&targets, secret, identity, facts).await?;
    info!(inviter = %joined.inviter.short(), address = joined.address, "joined");
    Ok(roster.adopt(joined.roster)?)
}
