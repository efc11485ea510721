//! Nodes on one machine find each other by multicast DNS over the loopback interface.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // clippy.toml exempts #[test] functions, not their helpers

use mlxnode_cluster::{Candidate, Discovery, MdnsDiscovery, MdnsOptions};
use std::io::{BufRead, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

const CHILD: &str = "MLXNODE_TEST_DISCOVERY_CHILD";

fn options(listen_port: u16, port: u16) -> MdnsOptions {
    MdnsOptions { listen: ([127, 0, 0, 1], listen_port).into(), port }
}

/// A UDP port of our own, so that tests and other users of multicast DNS stay apart.
fn free_port() -> u16 {
    std::net::UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
}

async fn sees(discovery: &dyn Discovery, what: &str, fits: impl Fn(&[Candidate]) -> bool) -> Vec<Candidate> {
    let mut candidates = discovery.candidates();
    let found = tokio::time::timeout(Duration::from_secs(10), candidates.wait_for(|list| fits(list))).await;
    found.unwrap_or_else(|_| panic!("not within ten seconds: {what}")).unwrap().clone()
}

#[tokio::test]
async fn two_nodes_in_one_process_find_each_other_and_see_an_invite_open_and_close() {
    let port = free_port();
    let first = MdnsDiscovery::start(options(7001, port)).unwrap();
    let second = MdnsDiscovery::start(options(7002, port)).unwrap();
    let found = sees(&first, "the second node", |list| !list.is_empty()).await;
    assert_eq!(found.len(), 1, "itself is not in the list: {found:?}");
    assert_eq!(
        (found[0].addresses.as_slice(), found[0].pairing),
        (["127.0.0.1:7002".to_owned()].as_slice(), false)
    );
    sees(&second, "the first node", |list| list.len() == 1 && !list[0].pairing).await;
    first.announce_pairing(true);
    sees(&second, "the open invite", |list| list.len() == 1 && list[0].pairing).await;
    first.announce_pairing(false);
    sees(&second, "the closed invite", |list| list.len() == 1 && !list[0].pairing).await;
    first.shutdown().await;
    sees(&second, "the farewell", <[Candidate]>::is_empty).await;
    second.shutdown().await;
}

#[tokio::test]
async fn two_nodes_in_two_processes_find_each_other() {
    if let Ok(port) = std::env::var(CHILD) {
        // The other process: announces itself, and leaves when its input ends.
        let discovery = MdnsDiscovery::start(options(7003, port.parse().unwrap())).unwrap();
        let seen = sees(&discovery, "the parent", |list| !list.is_empty()).await;
        println!("\nseen {}", seen[0].addresses[0]);
        let waits = tokio::task::spawn_blocking(|| std::io::stdin().lock().read_line(&mut String::new()));
        waits.await.unwrap().unwrap();
        discovery.shutdown().await;
        return;
    }
    let port = free_port();
    let discovery = MdnsDiscovery::start(options(7004, port)).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "two_nodes_in_two_processes_find_each_other", "--nocapture"])
        .env(CHILD, port.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    sees(&discovery, "the other process", |list| list.iter().any(|c| c.addresses == ["127.0.0.1:7003"]))
        .await;
    let output = std::io::BufReader::new(child.stdout.take().unwrap());
    let (tell, seen) = tokio::sync::oneshot::channel();
    let reading = tokio::task::spawn_blocking(move || {
        let mut tell = Some(tell);
        for line in output.lines().map_while(Result::ok).filter(|line| line.starts_with("seen ")) {
            tell.take().map(|tell| tell.send(line));
        }
    });
    assert_eq!(seen.await.unwrap(), "seen 127.0.0.1:7004");
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    sees(&discovery, "its farewell", <[Candidate]>::is_empty).await;
    assert!(tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap().success());
    reading.await.unwrap();
    discovery.shutdown().await;
}

/// A DNS answer that claims a node called `id`: PTR, SRV, TXT and A in one packet.
fn forged(id: &str) -> Vec<u8> {
    let name = |labels: &[&str]| {
        let mut bytes: Vec<u8> = Vec::new();
        for label in labels {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
        bytes
    };
    let (service, instance) =
        (name(&["_mlxnode", "_tcp", "local"]), name(&[id, "_mlxnode", "_tcp", "local"]));
    let host = name(&[id, "local"]);
    let mut packet = vec![0, 0, 0x84, 0, 0, 0, 0, 4, 0, 0, 0, 0];
    let mut record = |owner: &[u8], kind: u8, data: &[u8]| {
        packet.extend_from_slice(owner);
        packet.extend_from_slice(&[0, kind, 0, 1, 0, 0, 0x11, 0x94]);
        packet.extend_from_slice(&(data.len() as u16).to_be_bytes());
        packet.extend_from_slice(data);
    };
    record(&service, 12, &instance);
    record(&instance, 33, &[&[0, 0, 0, 0, 0x1b, 0x9e], host.as_slice()].concat());
    let texts = ["v=1".to_owned(), format!("id={id}"), "pair=1".to_owned()];
    let texts: Vec<u8> =
        texts.iter().flat_map(|text| [&[text.len() as u8], text.as_bytes()].concat()).collect();
    record(&instance, 16, &texts);
    record(&host, 1, &[127, 0, 0, 1]);
    packet
}

#[tokio::test]
async fn a_flood_of_forged_announcements_evicts_nobody() {
    let port = free_port();
    let (first, second) = (options(7005, port), options(7006, port));
    let (first, second) = (MdnsDiscovery::start(first).unwrap(), MdnsDiscovery::start(second).unwrap());
    let at = |port: u16| {
        move |list: &[Candidate]| list.iter().any(|c| c.addresses == [format!("127.0.0.1:{port}")])
    };
    sees(&first, "the second node", at(7006)).await;
    sees(&second, "the first node", at(7005)).await;
    let flood = tokio::task::spawn_blocking(move || {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for number in 0..3000 {
            socket.send_to(&forged(&format!("forged{number}")), ("127.0.0.1", port)).unwrap();
            if number % 50 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    flood.await.unwrap();
    // Both listen on one port; the system chose which one was hit.
    let flooded = |list: &[Candidate]| list.len() > 32;
    tokio::select! {
        _ = sees(&first, "the flood", flooded) => {}
        _ = sees(&second, "the flood", flooded) => {}
    }
    let lists = [&first, &second].map(|node| node.candidates().borrow().clone());
    assert!(lists.iter().all(|list| list.len() <= mlxnode_cluster::MAX_CANDIDATES));
    assert!(at(7006)(&lists[0]) && at(7005)(&lists[1]), "who was there before is there still");
    first.shutdown().await;
    second.shutdown().await;
}
