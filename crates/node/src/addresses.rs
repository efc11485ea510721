//! Under which addresses other nodes can reach this one's listener.

use std::net::{IpAddr, SocketAddr, UdpSocket};

/// HOST:PORT, best first: the bound address itself, or, when the listener is bound to all, every address of this machine that
/// others can use. Loopback only when there is nothing else.
pub(crate) fn reachable(bound: SocketAddr) -> Vec<String> {
    if !bound.ip().is_unspecified() {
        return vec![bound.to_string()];
    }
    let mut all: Vec<IpAddr> = if_addrs::get_if_addrs()
        .unwrap_or_default()
        .into_iter()
        .filter(|interface| !interface.is_loopback() && !interface.is_link_local())
        .map(|interface| interface.ip())
        .filter(|ip| bound.is_ipv6() || ip.is_ipv4())
        .collect();
    // IPv4 first: home networks always have it. Sorting is stable, so interfaces keep the system's order.
    all.sort_by_key(IpAddr::is_ipv6);
    if all.is_empty() {
        all.push(IpAddr::from([127, 0, 0, 1]));
    }
    all.into_iter().map(|ip| SocketAddr::new(ip, bound.port()).to_string()).collect()
}

/// How a client on this machine dials the listener.
pub(crate) fn local(bound: SocketAddr) -> SocketAddr {
    match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(IpAddr::from([127, 0, 0, 1]), bound.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => {
            SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), bound.port())
        }
        _ => bound,
    }
}

/// Names under which clients ask the HTTP listener at `bound`: the machine's and the node's, and every address if it is bound to all.
pub(crate) fn http_names(node: &str, bound: SocketAddr, reachable: &[String]) -> Vec<String> {
    let host = sysinfo::System::host_name().unwrap_or_default();
    let mut names = Vec::new();
    for name in [node, host.trim_end_matches(".local")] {
        names.push(name.to_owned());
        names.push(format!("{name}.local"));
    }
    names.retain(|name| !name.is_empty() && name != ".local");
    if bound.ip().is_unspecified() {
        let mut all = self::reachable(bound);
        all.extend_from_slice(reachable);
        names.extend(all.iter().map(|address| host_only(address)));
    }
    names
}

/// HOST of HOST:PORT, brackets of IPv6 included.
pub(crate) fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

/// HOST of HOST:PORT, without brackets.
fn host_only(address: &str) -> String {
    host(address).trim_matches(['[', ']']).to_owned()
}

/// The address from which this machine would talk to `peer` (HOST:PORT), as HOST:PORT. Nothing is sent: connecting a datagram
/// socket only looks into the routing table.
pub(crate) fn source_toward(peer: &str) -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect(peer).ok()?;
    let address = socket.local_addr().ok()?;
    (!address.ip().is_unspecified()).then(|| address.to_string())
}

/// `address` with the host of another one, if there is another one.
pub(crate) fn with_host_of(address: &str, other: Option<&str>) -> String {
    match (other, address.rsplit_once(':')) {
        (Some(other), Some((_, port))) => format!("{}:{port}", host(other)),
        _ => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_address_stands_for_itself_and_all_stands_for_the_interfaces() {
        assert_eq!(reachable("127.0.0.1:7".parse().unwrap()), ["127.0.0.1:7"]);
        let all = reachable("0.0.0.0:7".parse().unwrap());
        assert!(
            !all.is_empty()
                && all.iter().all(|address| address.ends_with(":7") && !address.starts_with("0."))
        );
        assert_eq!(local("0.0.0.0:7".parse().unwrap()), "127.0.0.1:7".parse().unwrap());
        assert_eq!(with_host_of("10.0.0.1:7", Some("10.0.0.9:1")), "10.0.0.9:7");
        assert_eq!(with_host_of("10.0.0.1:7", None), "10.0.0.1:7");
        let names = http_names("studio", "127.0.0.1:8080".parse().unwrap(), &["10.0.0.1:7".to_owned()]);
        assert!(
            names.contains(&"studio.local".to_owned()) && !names.contains(&"10.0.0.1".to_owned()),
            "{names:?}"
        );
        let names = http_names("studio", "0.0.0.0:8080".parse().unwrap(), &["[fe80::1]:7".to_owned()]);
        assert!(names.contains(&"fe80::1".to_owned()), "{names:?}");
        assert!(source_toward("127.0.0.1:9").is_some_and(|address| address.starts_with("127.0.0.1:")));
        assert_eq!((host("10.0.0.1:7"), host("[::1]:7")), ("10.0.0.1", "[::1]"));
    }
}
