//! Discovery by multicast DNS: the service `_mlxnode._tcp.local.`
//!
//! What is announced is as little as possible: the protocol version, a random id of this start, whether an invite is open,
//! and the port. No names, no hashes of keys: nobody on the network shall recognise a machine by it from day to day.

use super::{Candidate, Discovery, MAX_CANDIDATES};
use async_trait::async_trait;
use data_encoding::HEXLOWER;
use mdns_sd::{IfKind, Receiver, ResolvedService, ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use mlxnode_proto::PROTOCOL_VERSION;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

const SERVICE: &str = "_mlxnode._tcp.local.";
/// Most addresses that are taken from one candidate.
const MAX_ADDRESSES: usize = 8;
/// Most instances that are followed. The library keeps all that it hears of, without a limit; beyond this it is made to
/// forget them and to begin anew.
const MAX_INSTANCES: usize = 256;
/// Pause before it begins anew.
const PAUSE: Duration = Duration::from_secs(1);
/// How long after that a candidate has to show up again. They answer within a tenth of a second, but packets get lost.
const CONFIRM: Duration = Duration::from_secs(10);
/// How long taking back the announcement may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// How to announce and where to listen.
#[derive(Clone, Debug)]
pub struct MdnsOptions {
    /// Where this node's listener is bound. Its interface is the one that is used: all but loopback for an unspecified
    /// address, loopback alone for a loopback address.
    pub listen: SocketAddr,
    /// The UDP port of multicast DNS. Another one than 5353 keeps tests apart from everything else.
    pub port: u16,
}

impl MdnsOptions {
    /// For a listener at `listen`, on the ordinary port.
    pub fn new(listen: SocketAddr) -> Self {
        Self { listen, port: mdns_sd::MDNS_PORT }
    }
}

/// Why there is no multicast DNS. The node works without it, with `--peer HOST:PORT`.
#[derive(Debug, thiserror::Error)]
#[error("cannot use multicast DNS: say where other nodes are with `--peer HOST:PORT`")]
pub struct MdnsError(#[source] mdns_sd::Error);

/// A [`Discovery`] by multicast DNS. Ends when dropped; [`Discovery::shutdown`] also takes the announcement back.
pub struct MdnsDiscovery {
    daemon: ServiceDaemon,
    id: String,
    listen: SocketAddr,
    candidates: Arc<watch::Sender<Vec<Candidate>>>,
    pairing: std::sync::Mutex<Pairing>,
    end: CancellationToken,
    _looking: AbortOnDropHandle<Option<()>>,
}

/// An open invite is announced by an instance of its own, under a new name each time. To change the text of one instance
/// would not do: receivers keep both texts for a second (RFC 6762 §10.2), and which of them counts is chance.
#[derive(Default)]
struct Pairing {
    opened: u64,
    instance: Option<String>,
}

impl MdnsDiscovery {
    /// Announces this node and begins to look for others.
    ///
    /// # Errors
    /// [`MdnsError`] when the system gives no sockets or threads for it.
    pub fn start(options: MdnsOptions) -> Result<Self, MdnsError> {
        let daemon = ServiceDaemon::new_with_port(options.port).map_err(MdnsError)?;
        let ip = options.listen.ip();
        // Later choices go over earlier ones.
        let (off, on) = match ip {
            IpAddr::V4(v4) if v4.is_loopback() => (vec![IfKind::All], vec![IfKind::LoopbackV4]),
            IpAddr::V6(v6) if v6.is_loopback() => (vec![IfKind::All], vec![IfKind::LoopbackV6]),
            ip if ip.is_unspecified() => (vec![IfKind::LoopbackV4, IfKind::LoopbackV6], vec![]),
            ip => (vec![IfKind::All], vec![IfKind::Addr(ip)]),
        };
        daemon.disable_interface(off).map_err(MdnsError)?;
        if !on.is_empty() {
            daemon.enable_interface(on).map_err(MdnsError)?;
        }
        let id = HEXLOWER.encode(&rand::random::<[u8; 8]>());
        let candidates = Arc::new(watch::Sender::new(Vec::new()));
        let end = CancellationToken::new();
        let looking = look(daemon.clone(), id.clone(), candidates.clone());
        let looking = tokio::spawn(end.clone().run_until_cancelled_owned(looking));
        let discovery = Self {
            daemon,
            id,
            listen: options.listen,
            candidates,
            pairing: std::sync::Mutex::default(),
            end,
            _looking: AbortOnDropHandle::new(looking),
        };
        discovery.announce(&discovery.id, false).map_err(MdnsError)?;
        Ok(discovery)
    }

    fn announce(&self, instance: &str, pairing: bool) -> Result<(), mdns_sd::Error> {
        let version = PROTOCOL_VERSION.to_string();
        let properties =
            [("v", version.as_str()), ("id", &self.id), ("pair", if pairing { "1" } else { "0" })];
        let host = format!("mlxnode-{}.local.", self.id);
        let ip = self.listen.ip();
        let service = if ip.is_unspecified() {
            ServiceInfo::new(SERVICE, instance, &host, (), self.listen.port(), &properties[..])?
                .enable_addr_auto()
        } else {
            ServiceInfo::new(SERVICE, instance, &host, ip, self.listen.port(), &properties[..])?
        };
        self.daemon.register(service)
    }
}

#[async_trait]
impl Discovery for MdnsDiscovery {
    fn candidates(&self) -> watch::Receiver<Vec<Candidate>> {
        self.candidates.subscribe()
    }

    fn announce_pairing(&self, open: bool) {
        let mut announced = self.pairing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let outcome = match (open, announced.instance.take()) {
            (true, None) => {
                announced.opened += 1;
                let instance = format!("{}-{}", self.id, announced.opened);
                let outcome = self.announce(&instance, true);
                announced.instance = outcome.is_ok().then_some(instance);
                outcome
            }
            (false, Some(instance)) => self.daemon.unregister(&format!("{instance}.{SERVICE}")).map(drop),
            (_, unchanged) => {
                announced.instance = unchanged;
                Ok(())
            }
        };
        if let Err(error) = outcome {
            warn!(%error, "cannot announce by multicast DNS whether an invite is open");
        }
    }

    async fn shutdown(&self) {
        self.announce_pairing(false);
        self.end.cancel();
        if let Ok(done) = self.daemon.unregister(&format!("{}.{SERVICE}", self.id)) {
            let _ = tokio::time::timeout(FAREWELL, done.recv_async()).await;
        }
        if let Ok(done) = self.daemon.shutdown() {
            let _ = tokio::time::timeout(FAREWELL, done.recv_async()).await;
        }
    }
}

impl Drop for MdnsDiscovery {
    fn drop(&mut self) {
        // The daemon's thread ends; after a shutdown it has, and this fails.
        let _ = self.daemon.shutdown();
    }
}

/// Keeps the list of candidates true, for ever. The library ends a search of which the events are not taken quickly enough,
/// and a flood of forged announcements makes [`follow`] end one: then the next one begins.
async fn look(daemon: ServiceDaemon, own: String, candidates: Arc<watch::Sender<Vec<Candidate>>>) {
    let mut found = Found::new(own);
    loop {
        match daemon.browse(SERVICE) {
            Ok(events) => follow(&events, &mut found, &candidates).await,
            Err(error) => debug!(%error, "cannot look for nodes by multicast DNS"),
        }
        // Forgets all instances, too.
        let _ = daemon.stop_browse(SERVICE);
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(
    events: &Receiver<ServiceEvent>,
    found: &mut Found,
    candidates: &watch::Sender<Vec<Candidate>>,
) {
    found.confirmed.clear();
    let mut instances = 0;
    let mut confirm = Box::pin(tokio::time::sleep(CONFIRM));
    loop {
        let changed = tokio::select! {
            event = events.recv_async() => match event {
                Ok(event) => {
                    instances += usize::from(matches!(event, ServiceEvent::ServiceFound(..)));
                    found.note(event)
                }
                Err(_) => return,
            },
            () = &mut confirm => {
                confirm = Box::pin(tokio::time::sleep(Duration::from_secs(u64::from(u32::MAX))));
                found.drop_unconfirmed()
            }
        };
        if changed {
            candidates.send_replace(found.list());
        }
        if instances > MAX_INSTANCES {
            debug!("a flood of announcements by multicast DNS: looking anew");
            return;
        }
    }
}

/// The candidates of now, by the full name of the announced instance: a node with an open invite has two.
struct Found {
    own: String,
    candidates: BTreeMap<String, Candidate>,
    /// Those that showed up since this search began.
    confirmed: BTreeSet<String>,
}

impl Found {
    fn new(own: String) -> Self {
        Self { own, candidates: BTreeMap::new(), confirmed: BTreeSet::new() }
    }

    /// Drops what was left from the search before and did not show up in this one. True when that was something.
    fn drop_unconfirmed(&mut self) -> bool {
        let before = self.candidates.len();
        self.candidates.retain(|fullname, _| self.confirmed.contains(fullname));
        self.candidates.len() < before
    }

    fn list(&self) -> Vec<Candidate> {
        let mut by_id = BTreeMap::<&str, Candidate>::new();
        for candidate in self.candidates.values() {
            let merged = by_id.entry(&candidate.id).or_insert_with(|| candidate.clone());
            merged.pairing |= candidate.pairing;
        }
        by_id.into_values().collect()
    }

    /// True when the list changed.
    fn note(&mut self, event: ServiceEvent) -> bool {
        match event {
            ServiceEvent::ServiceResolved(service) => {
                let Some(candidate) = candidate(&service).filter(|candidate| candidate.id != self.own) else {
                    return self.candidates.remove(&service.fullname).is_some();
                };
                if self.candidates.len() >= MAX_CANDIDATES && !self.candidates.contains_key(&service.fullname)
                {
                    debug!("too many candidates by multicast DNS: one is left out");
                    return false;
                }
                self.confirmed.insert(service.fullname.clone());
                self.candidates.insert(service.fullname.clone(), candidate.clone()) != Some(candidate)
            }
            ServiceEvent::ServiceRemoved(_, fullname) => {
                self.confirmed.remove(&fullname);
                self.candidates.remove(&fullname).is_some()
            }
            _ => false,
        }
    }
}

/// The announcement as a hint; `None` when it is no hint for this version.
fn candidate(service: &ResolvedService) -> Option<Candidate> {
    let property = |key| service.get_property_val_str(key);
    if property("v")?.parse() != Ok(PROTOCOL_VERSION) {
        return None;
    }
    let id = property("id")?;
    if id.is_empty() || id.len() > 32 || !id.chars().all(|c| c.is_ascii_alphanumeric()) {
        return None;
    }
    // A link-local IPv6 address means nothing without an interface; others come with it.
    let usable = |scoped: &ScopedIp| match scoped.to_ip_addr() {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => None,
        ip => Some(ip),
    };
    let mut addresses: Vec<IpAddr> = service.get_addresses().iter().filter_map(usable).collect();
    addresses.sort(); // IPv4 first, and the same order every time
    addresses.truncate(MAX_ADDRESSES);
    if addresses.is_empty() || service.get_port() == 0 {
        return None;
    }
    let port = service.get_port();
    let addresses = addresses.into_iter().map(|ip| SocketAddr::new(ip, port).to_string()).collect();
    Some(Candidate { id: id.to_owned(), addresses, pairing: property("pair") == Some("1") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(id: &str, version: &str, ip: &str) -> ServiceEvent {
        let properties = [("v", version), ("id", id), ("pair", "1")];
        let service = ServiceInfo::new(SERVICE, id, "host.local.", ip, 7070, &properties[..]).unwrap();
        ServiceEvent::ServiceResolved(Box::new(service.as_resolved_service()))
    }

    #[test]
    fn a_flood_of_forged_announcements_is_bounded_and_evicts_nobody() {
        let mut found = Found::new("me".into());
        assert!(found.note(resolved("first", "1", "10.0.0.1")));
        for number in 0..1000 {
            found.note(resolved(&format!("forged{number}"), "1", "10.0.0.66"));
        }
        assert_eq!(found.list().len(), MAX_CANDIDATES);
        assert!(found.list().iter().any(|candidate| candidate.id == "first"));

        // The next search: what does not show up again goes.
        found.confirmed.clear();
        assert!(!found.note(resolved("first", "1", "10.0.0.1")));
        assert!(found.drop_unconfirmed());
        assert_eq!(found.list().len(), 1);
    }

    #[test]
    fn itself_other_versions_and_nonsense_are_no_candidates() {
        let mut found = Found::new("me".into());
        assert!(!found.note(resolved("me", "1", "10.0.0.1")));
        assert!(!found.note(resolved("newer", "2", "10.0.0.1")));
        assert!(!found.note(resolved("what is this", "1", "10.0.0.1")));
        assert!(!found.note(resolved("local", "1", "fe80::1")));
        assert!(found.list().is_empty());
        assert!(found.note(resolved("you", "1", "10.0.0.1")));
        assert!(!found.note(resolved("you", "1", "10.0.0.1")), "no news");
        assert_eq!(found.list()[0].addresses, ["10.0.0.1:7070"]);
        assert!(found.note(ServiceEvent::ServiceRemoved(SERVICE.into(), format!("you.{SERVICE}"))));
    }
}
