//! Where this node looks for others: mDNS, and the addresses that the command line names.

use async_trait::async_trait;
use mlxnode_cluster::{Candidate, Discovery, MAX_CANDIDATES, MdnsDiscovery, MdnsOptions, StaticDiscovery};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

/// Both sources as one [`Discovery`].
pub(crate) struct Lookout {
    mdns: Option<Arc<MdnsDiscovery>>,
    merged: Arc<watch::Sender<Vec<Candidate>>>,
    _merging: AbortOnDropHandle<()>,
}

impl Lookout {
    /// Starts looking. Without mDNS, or when the system does not allow it, only the named addresses count.
    pub(crate) fn start(listen: SocketAddr, use_mdns: bool, peers: &[String]) -> Self {
        let mdns = match use_mdns.then(|| MdnsDiscovery::start(MdnsOptions::new(listen))) {
            Some(Ok(mdns)) => Some(Arc::new(mdns)),
            Some(Err(error)) => {
                warn!(reason = crate::error::chain(&error), "other nodes are not found by themselves");
                None
            }
            None => None,
        };
        let fixed = StaticDiscovery::new(peers.iter().cloned());
        let named = fixed.candidates().borrow().clone();
        let merged = Arc::new(watch::Sender::new(named.clone()));
        let found = mdns.as_ref().map(|mdns| mdns.candidates());
        let merging = tokio::spawn(merge(named, found, merged.clone()));
        Self { mdns, merged, _merging: AbortOnDropHandle::new(merging) }
    }

    /// What mDNS alone finds, to look for open invites.
    pub(crate) fn mdns(&self) -> Option<&MdnsDiscovery> {
        self.mdns.as_deref()
    }
}

#[async_trait]
impl Discovery for Lookout {
    fn candidates(&self) -> watch::Receiver<Vec<Candidate>> {
        self.merged.subscribe()
    }

    fn announce_pairing(&self, open: bool) {
        if let Some(mdns) = &self.mdns {
            mdns.announce_pairing(open);
        }
    }

    async fn shutdown(&self) {
        if let Some(mdns) = &self.mdns {
            mdns.shutdown().await;
        }
    }
}

/// Keeps the merged list: named addresses first, so that a flood of announcements cannot push them out.
async fn merge(
    named: Vec<Candidate>,
    found: Option<watch::Receiver<Vec<Candidate>>>,
    merged: Arc<watch::Sender<Vec<Candidate>>>,
) {
    let Some(mut found) = found else { return };
    loop {
        let all =
            named.iter().chain(found.borrow_and_update().iter()).take(MAX_CANDIDATES).cloned().collect();
        merged.send_replace(all);
        if found.changed().await.is_err() {
            return;
        }
    }
}
