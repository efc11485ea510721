//! What someone without a key in the roster gets out of the ports of a running cluster: a TLS alert and nothing else.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Every port that the processes of the cluster listen on, workers included.
fn listening_ports(pids: &[u32]) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for pid in pids {
        let inodes: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))?
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
            .collect();
        for line in std::fs::read_to_string(format!("/proc/{pid}/net/tcp"))?.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (local, state, inode) = (fields[1], fields[3], fields[9]);
            if state == "0A" && inodes.iter().any(|mine| mine == inode) {
                let port = local.split(':').nth(1).context("address:port")?;
                ports.push(u16::from_str_radix(port, 16)?);
            }
        }
    }
    Ok(ports)
}

/// Sends bytes and reads what comes back until the other side closes.
fn answer_to(port: u16, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(8)))?;
    stream.write_all(bytes)?;
    let mut answer = Vec::new();
    // A reset is as good a refusal as a close.
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            anyhow::bail!("port {port} keeps a stranger waiting")
        }
        _ => Ok(answer),
    }
}

#[test]
fn story_a_stranger_gets_nothing_but_an_alert_out_of_any_port() -> Result<()> {
    // HTTP is in plain text, on the loopback only unless there are keys; its own tests hold it to that.
    let cluster = LocalCluster::start_with(2, &["--no-http"])?;
    let loaded = cluster.first().json(&["load", "demo", "--stages", "2"])?;
    let mut pids: Vec<u32> = cluster.nodes.iter().map(|node| node.pid()).collect();
    for stage in loaded["stages"].as_array().context("stages")? {
        pids.push(stage["worker_pid"].as_u64().context("worker_pid")? as u32);
    }
    let ports = listening_ports(&pids)?;
    ensure!(ports.len() >= 4, "two nodes and two workers listen: {ports:?}");
    let folder = tempfile::tempdir()?;
    let key = folder.path().join("key.pem");
    let certificate = folder.path().join("cert.pem");
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=stranger",
        ])
        .args(["-days", "10", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .stderr(Stdio::null())
        .status()
        .context("cannot run openssl")?;
    ensure!(made.success(), "openssl made no certificate");
    for port in ports {
        // Plain text: at most one alert record (type 21).
        for bytes in
            [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[0; 64]]
        {
            let answer = answer_to(port, bytes)?;
            ensure!(
                answer.is_empty() || (answer[0] == 21 && answer.len() == 7),
                "port {port} answered {answer:?}"
            );
        }
        // TLS with a key that nobody knows, and with none: the handshake ends in an alert before any application byte.
        for with_key in [true, false] {
            for alpn in ["h2", "mlxnode-pair/1"] {
                let mut client = Command::new("openssl");
                client.args([
                    "s_client",
                    "-connect",
                    &format!("127.0.0.1:{port}"),
                    "-alpn",
                    alpn,
                    "-quiet",
                    "-no_ign_eof",
                ]);
                if with_key {
                    client.arg("-cert").arg(&certificate).arg("-key").arg(&key);
                }
                let mut child =
                    client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
                // Say the HTTP/2 preface, so that a server which accepted the key would answer with its settings.
                let mut stdin = child.stdin.take().context("stdin is piped")?;
                let _ = stdin.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
                let _ = stdin.flush();
                std::thread::sleep(Duration::from_millis(300));
                drop(stdin);
                let output = child.wait_with_output()?;
                let words = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(
                    output.stdout.is_empty(),
                    "port {port}, {alpn}, key {with_key}: got {:?}",
                    output.stdout
                );
                ensure!(
                    words.to_lowercase().contains("alert"),
                    "port {port}, {alpn}, key {with_key}: no alert: {words}"
                );
            }
        }
    }
    Ok(())
}
