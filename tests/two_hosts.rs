//! Two hosts with addresses of their own, a bridge and real multicast (Linux network namespaces): the whole story, joining by
//! short code, with every byte on the wire captured.
#![cfg(target_os = "linux")]

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::netlab::NetLab;
use mlxnode_testkit::node::{NodeProcess, NodeSetup};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A capture that ends when the test does.
struct Capture(Child);

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn story_two_hosts_find_each_other_pair_by_short_code_and_leave_no_plaintext_on_the_wire() -> Result<()> {
    let lab = NetLab::new(2)?;
    let folder = tempfile::tempdir()?;
    let captured = folder.path().join("wire.pcap");
    let command = lab.capture_command(&captured);
    let capture = Capture(
        Command::new(&command[0])
            .args(&command[1..])
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run tcpdump (Debian package tcpdump)")?,
    );
    eventually(Duration::from_secs(10), || {
        ensure!(captured.is_file(), "the capture has not begun");
        Ok(())
    })?;
    let setup = |index: usize, invite: Option<String>| NodeSetup {
        name: format!("host{index}"),
        listen: format!("{}:0", lab.hosts[index].address),
        invite,
        prefix: lab.hosts[index].prefix(),
        ..NodeSetup::default()
    };
    let first = NodeProcess::start(&folder.path().join("first"), &setup(0, None))?;
    let invite = first.json(&["invite"])?;
    let code = invite["code"].as_str().context("code")?.to_owned();
    let second = NodeProcess::start(&folder.path().join("second"), &setup(1, Some(code)))?;
    assert_eq!(second.ready.cluster, first.ready.cluster);
    for node in [&first, &second] {
        eventually(Duration::from_secs(15), || {
            let status = node.json(&["status"])?;
            let alive = status["nodes"]
                .as_array()
                .context("nodes")?
                .iter()
                .filter(|node| node["state"] == "alive")
                .count();
            ensure!(alive == 2, "{status}");
            Ok(())
        })?;
    }
    first.json(&["load", "demo", "--stages", "2"])?;
    // The second host is the front: prompt, activations and answer all cross the bridge.
    let canary = "What is 17 + 25? canary-5e1f7a";
    second.json(&["generate", "--prompt", canary])?;
    let answer = second.json(&["generate", "--prompt", "What is 17 + 25?"])?;
    ensure!(answer["text"].as_str().context("text")?.contains("42"), "{answer}");
    first.json(&["unload", "demo"])?;
    second.stop(Duration::from_secs(10))?;
    first.stop(Duration::from_secs(10))?;
    // Packets reach the file a moment after the wire; then the capture is complete.
    let bytes = eventually(Duration::from_secs(10), || {
        let bytes = std::fs::read(&captured)?;
        ensure!(bytes.len() > 20_000, "the capture holds the conversation ({} bytes)", bytes.len());
        Ok(bytes)
    })?;
    drop(capture);
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    ensure!(holds("_mlxnode"), "the capture sees the bridge: mDNS is on it");
    for secret in ["canary-5e1f7a", "mlxnode.internal.v1", "mlxnode.v1"] {
        ensure!(!holds(secret), "{secret} crossed the wire in plain text");
    }
    Ok(())
}
