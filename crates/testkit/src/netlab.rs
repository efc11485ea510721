//! Hosts of a network of their own: Linux network namespaces joined by a bridge, with real multicast.
//!
//! Needs root (`ip netns`). Everything is made under names of this process and removed when the lab is dropped, also
//! when a test fails.

use anyhow::{Context as _, Result, ensure};
use std::process::Command;

/// A bridge with hosts at 10.77.0.1, 10.77.0.2, …
pub struct NetLab {
    bridge: String,
    /// The namespaces' names, in the order of their addresses.
    pub hosts: Vec<Host>,
}

/// One host of the lab.
#[derive(Clone, Debug)]
pub struct Host {
    /// Name of the network namespace.
    pub namespace: String,
    /// Its address on the bridge.
    pub address: String,
}

impl Host {
    /// The command line that runs a program on this host.
    pub fn prefix(&self) -> Vec<String> {
        ["ip", "netns", "exec", &self.namespace].map(str::to_owned).to_vec()
    }
}

impl NetLab {
    /// Makes `count` hosts.
    pub fn new(count: usize) -> Result<Self> {
        let id = std::process::id() % 100_000;
        let bridge = format!("mxb{id}");
        let mut lab = Self { bridge, hosts: Vec::new() };
        // The bridge lives in a namespace of its own, so that nothing of the machine's own network changes.
        ip(&["netns", "add", &lab.bridge])?;
        ip(&["-n", &lab.bridge, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0"])?;
        ip(&["-n", &lab.bridge, "link", "set", "br0", "up"])?;
        for index in 1..=count {
            let host = Host { namespace: format!("mxh{id}-{index}"), address: format!("10.77.0.{index}") };
            let port = format!("p{index}");
            ip(&["netns", "add", &host.namespace])?;
            lab.hosts.push(host.clone());
            let inside = &host.namespace;
            ip(&[
                "-n",
                &lab.bridge,
                "link",
                "add",
                &port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                inside,
            ])?;
            ip(&["-n", &lab.bridge, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", inside, "addr", "add", &format!("{}/24", host.address), "dev", "eth0"])?;
            ip(&["-n", inside, "link", "set", "eth0", "up"])?;
            ip(&["-n", inside, "link", "set", "lo", "up"])?;
            ip(&["-n", inside, "route", "add", "224.0.0.0/4", "dev", "eth0"])?;
        }
        Ok(lab)
    }

    /// The command line that captures everything that crosses the bridge into a file.
    pub fn capture_command(&self, file: &std::path::Path) -> Vec<String> {
        let file = file.display().to_string();
        [
            "ip",
            "netns",
            "exec",
            &self.bridge,
            "tcpdump",
            "-i",
            "br0",
            "-U",
            "--immediate-mode",
            "-s",
            "0",
            "-w",
            &file,
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

impl Drop for NetLab {
    fn drop(&mut self) {
        for host in &self.hosts {
            let _ = ip(&["netns", "delete", &host.namespace]);
        }
        let _ = ip(&["netns", "delete", &self.bridge]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output =
        Command::new("ip").args(arguments).output().context("cannot run `ip` (Debian package iproute2)")?;
    ensure!(
        output.status.success(),
        "ip {} failed (network namespaces need root): {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
