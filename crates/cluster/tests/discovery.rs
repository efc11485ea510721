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
