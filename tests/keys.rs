//! API keys across a cluster: made on one node, valid and refused on all, gone within a second, and kept over a restart.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::binary;
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::{NodeProcess, NodeSetup};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How long a node may take to hear of a key.
const NEWS: Duration = Duration::from_secs(1);

/// The status and the text that a node answers with.
fn get(node: &NodeProcess, path: &str, key: Option<&str>) -> Result<(u16, String)> {
    let url = node.ready.http.as_deref().context("the node serves HTTP")?;
    let address = url.strip_prefix("http://").context("a URL")?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let key = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{key}\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).context("a status")?.parse()?;
    Ok((status, answer))
}

fn models(node: &NodeProcess, key: Option<&str>) -> Result<u16> {
    Ok(get(node, "/v1/models", key)?.0)
}

#[test]
fn story_a_key_made_on_one_node_is_asked_for_on_all_and_revoked_on_all() -> Result<()> {
    let mut cluster = LocalCluster::start(2)?;
    for node in &cluster.nodes {
        eventually(Duration::from_secs(5), || {
            let status = models(node, None)?;
            ensure!(status == 200, "open on this machine while there is no key: {status}");
            Ok(())
        })?;
    }
    // Asked of the node that does not coordinate.
    let made = cluster.nodes[1].json(&["keys", "create", "ann", "--requests-per-minute", "600"])?;
    let key = made["key"].as_str().context("key")?.to_owned();
    ensure!(key.starts_with("mlx-") && key.len() == 47, "{key}");
    let asked = Instant::now();
    for node in &cluster.nodes {
        eventually(NEWS, || {
            let statuses = (models(node, None)?, models(node, Some(&key))?);
            ensure!(statuses == (401, 200), "{statuses:?}");
            Ok(())
        })?;
    }
    ensure!(asked.elapsed() < 2 * NEWS, "{:?}", asked.elapsed());
    let listed = cluster.first().json(&["keys", "list"])?;
    assert_eq!(listed["keys"][0]["name"], "ann");
    assert_eq!(listed["keys"][0]["role"], "user");
    ensure!(!listed.to_string().contains(&key[4..]), "the text is shown once");
    let twice = cluster.first().output(&["keys", "create", "ann"])?;
    let text = String::from_utf8_lossy(&twice.stderr).into_owned();
    ensure!(!twice.status.success() && text.contains("revoke"), "{text}");

    // Kept over a restart of the coordinator, and on no disk in the clear.
    cluster.restart(0)?;
    cluster.wait_until_all_alive()?;
    for node in &cluster.nodes {
        eventually(Duration::from_secs(5), || {
            let statuses = (models(node, None)?, models(node, Some(&key))?);
            ensure!(statuses == (401, 200), "{statuses:?}");
            Ok(())
        })?;
        for name in ["control.db", "control.db-wal"] {
            let bytes = std::fs::read(node.data_dir().join(name)).unwrap_or_default();
            let is_there = bytes.windows(key.len() - 4).any(|window| window == &key.as_bytes()[4..]);
            ensure!(!is_there, "the key is in {name}");
        }
        ensure!(!node.log().contains(&key[4..]), "the key is in the log");
    }

    cluster.nodes[1].json(&["keys", "revoke", "ann"])?;
    for node in &cluster.nodes {
        eventually(NEWS, || {
            // Without any key this machine's own programs are let in again, and a key is not asked for.
            let status = models(node, None)?;
            ensure!(status == 200, "{status}");
            Ok(())
        })?;
    }
    let (status, figures) = get(cluster.first(), "/metrics", None)?;
    assert_eq!(status, 200);
    ensure!(figures.contains("mlxnode_nodes{state=\"alive\"} 2"), "{figures}");
    ensure!(!figures.contains(&key[4..]), "the key is in the figures");
    Ok(())
}

#[test]
fn story_http_for_other_machines_starts_with_a_key_only() -> Result<()> {
    let mut cluster = LocalCluster::start(1)?;
    let node = cluster.nodes.remove(0);
    let data_dir = node.data_dir().to_owned();
    let key = node.json(&["keys", "create", "ann"])?["key"].as_str().context("key")?.to_owned();
    node.json(&["keys", "revoke", "ann"])?;
    node.stop(Duration::from_secs(15))?;

    let join = ["join", "--json", "--listen", "127.0.0.1:0", "--http", "0.0.0.0:0", "--data-dir"];
    let refused = binary::command()?.args(join).arg(&data_dir).output()?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "it started without a key");
    for word in ["0.0.0.0", "mlxnode keys create", "mlxnode join"] {
        ensure!(text.contains(word), "no {word:?} in {text}");
    }

    let setup = NodeSetup::default();
    let node = NodeProcess::start(&data_dir, &setup)?;
    let second = node.json(&["keys", "create", "bob"])?["key"].as_str().context("key")?.to_owned();
    node.stop(Duration::from_secs(15))?;
    let setup = NodeSetup { http: "0.0.0.0:0".to_owned(), ..setup };
    let node = NodeProcess::start(&data_dir, &setup)?;
    assert_eq!(models(&node, None)?, 401);
    assert_eq!(models(&node, Some(&key))?, 401, "a revoked key");
    assert_eq!(models(&node, Some(&second))?, 200);
    assert_eq!(get(&node, "/metrics", None)?.0, 401, "figures are not for everybody there");
    Ok(())
}
