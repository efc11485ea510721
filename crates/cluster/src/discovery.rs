//! Where to look for other nodes: hints, never proof.
//!
//! What a [`Discovery`] says is who claims to be at an address; who really is shows in the TLS handshake. So a false hint
//! costs a dial, and a lost one (mDNS forgets, Wi-Fi drops multicast) costs nothing once a peer is known.

mod mdns;

pub use mdns::{MdnsDiscovery, MdnsError, MdnsOptions};

use crate::pairing::Inviter;
use async_trait::async_trait;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Most hints that are kept. A flood of forged ones pushes out none that came before.
pub const MAX_CANDIDATES: usize = 64;

/// Somebody who says that it is an mlxnode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Random, new with each start of that node: it tells candidates apart and nothing else.
    pub id: String,
    /// Where it says it listens (HOST:PORT), best first.
    pub addresses: Vec<String>,
    /// Does it say that an invite is open?
    pub pairing: bool,
}

/// Finds candidates, and lets others find this node.
#[async_trait]
pub trait Discovery: Send + Sync + 'static {
    /// Follows the candidates: the whole list on every change, without this node itself.
    fn candidates(&self) -> watch::Receiver<Vec<Candidate>>;

    /// Tells others whether an invite is open here.
    fn announce_pairing(&self, open: bool);

    /// Takes this node's announcement back and ends everything that runs.
    async fn shutdown(&self);
}

/// A fixed list: for `--peer HOST:PORT`, and for tests.
#[derive(Debug)]
pub struct StaticDiscovery {
    candidates: watch::Sender<Vec<Candidate>>,
}

impl StaticDiscovery {
    /// One candidate per address. Whether an invite is open there shows when asked.
    pub fn new(addresses: impl IntoIterator<Item = String>) -> Self {
        let candidate =
            |address: String| Candidate { id: address.clone(), addresses: vec![address], pairing: true };
        let candidates = addresses.into_iter().take(MAX_CANDIDATES).map(candidate).collect();
        Self { candidates: watch::Sender::new(candidates) }
    }

    /// Replaces the list.
    pub fn set(&self, candidates: Vec<Candidate>) {
        self.candidates.send_replace(candidates);
    }
}

#[async_trait]
impl Discovery for StaticDiscovery {
    fn candidates(&self) -> watch::Receiver<Vec<Candidate>> {
        self.candidates.subscribe()
    }

    fn announce_pairing(&self, _open: bool) {} // a fixed list tells nobody anything

    async fn shutdown(&self) {}
}

/// The addresses of candidates with an open invite. Waits for the first one at most `patience`, and then a moment for more.
pub async fn find_inviters(discovery: &dyn Discovery, patience: Duration) -> Vec<String> {
    const SETTLE: Duration = Duration::from_millis(300);
    let mut candidates = discovery.candidates();
    let inviting = |candidate: &Candidate| candidate.pairing;
    let found = candidates.wait_for(|list| list.iter().any(inviting));
    if tokio::time::timeout(patience, found).await.is_ok_and(|found| found.is_ok()) {
        tokio::time::sleep(SETTLE.min(patience)).await;
    }
    let list = candidates.borrow();
    list.iter()
        .filter(|candidate| inviting(candidate))
        .flat_map(|candidate| candidate.addresses.clone())
        .collect()
}

/// Keeps the announcement true: while `inviter` has an invite open, `discovery` says so. Runs until `shutdown`.
pub async fn announce_invites(
    inviter: Arc<Inviter>,
    discovery: Arc<dyn Discovery>,
    shutdown: CancellationToken,
) {
    let mut open_until = inviter.open_until();
    loop {
        let until = *open_until.borrow_and_update();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        discovery.announce_pairing(left.is_some_and(|left| !left.is_zero()));
        let runs_out = async {
            match left.filter(|left| !left.is_zero()) {
                Some(left) => tokio::time::sleep(left).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = open_until.changed() => if changed.is_err() { return },
            () = runs_out => {}
            () = shutdown.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(id: &str, pairing: bool) -> Candidate {
        Candidate { id: id.into(), addresses: vec![format!("{id}:7070")], pairing }
    }

    #[tokio::test]
    async fn only_candidates_with_an_open_invite_are_asked() {
        let discovery = Arc::new(StaticDiscovery::new([]));
        assert!(find_inviters(&*discovery, Duration::from_millis(20)).await.is_empty());
        let finding = tokio::spawn({
            let discovery = discovery.clone();
            async move { find_inviters(&*discovery, Duration::from_secs(60)).await }
        });
        tokio::task::yield_now().await;
        discovery.set(vec![candidate("closed", false)]);
        tokio::task::yield_now().await;
        discovery.set(vec![candidate("closed", false), candidate("open", true)]);
        assert_eq!(finding.await.unwrap(), ["open:7070"]);
    }
}
