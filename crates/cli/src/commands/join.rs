//! `mlxnode join`: starts a node on this Mac; the first one makes a cluster, the others come by invite.

use crate::arguments::{Global, duration};
use crate::commands::data_dir;
use crate::output;
use crate::training::TrainingReader;
use anyhow::{Context as _, Result, bail};
use clap::Args;
use mlxnode_compute::ByteCount;
use mlxnode_node::{HttpOptions, Node, NodeOptions};
use serde::Serialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Start a node on this Mac.
///
/// The first `join` makes a cluster. On every other Mac, `join --invite CODE` finds the cluster in the local network, pairs and joins;
/// from then on plain `join` is enough. The node runs until it is interrupted; `mlxnode leave` takes it out of the cluster.
///
/// Every connection is encrypted, and only Macs that were invited are let in.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode join
  mlxnode join --invite 7H2K-93QF
  mlxnode join --listen 127.0.0.1:0 --data-dir /tmp/second-node")]
pub struct Join {
    /// Code or token from `mlxnode invite` on a Mac that is in the cluster.
    #[arg(long, value_name = "CODE")]
    invite: Option<String>,
    /// Address and port to listen on. Port 0 takes a free one.
    ///
    /// The default, all interfaces, is what other Macs need; 127.0.0.1:0 keeps the node to this machine.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7420")]
    listen: String,
    /// Address and port for HTTP clients (OpenAI's and Anthropic's APIs). Port 0 takes a free one.
    ///
    /// Default: 127.0.0.1:8080, or another port of this machine when that one is taken.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "no_http")]
    http: Option<String>,
    /// Serve no HTTP.
    #[arg(long)]
    no_http: bool,
    /// A further name that HTTP clients may call this node by; repeat for several.
    ///
    /// Requests to other names are refused, so that no web page can reach the node by a name of its own.
    #[arg(long = "http-host", value_name = "NAME", conflicts_with = "no_http")]
    http_hosts: Vec<String>,
    /// Origin of a web page that may ask this node, such as `https://chat.example`; repeat for several.
    #[arg(long = "http-origin", value_name = "ORIGIN", conflicts_with = "no_http")]
    http_origins: Vec<String>,
    /// Ask HTTP clients on this Mac for an API key too, even while the cluster has none (`mlxnode keys`).
    #[arg(long, conflicts_with = "no_http")]
    require_key: bool,
    /// Address of another node, for networks without mDNS; repeat for several.
    #[arg(long = "peer", value_name = "HOST:PORT")]
    peers: Vec<String>,
    /// Do not use mDNS: neither announce this node nor look for others.
    #[arg(long)]
    no_discovery: bool,
    /// Name of this node. Default: the Mac's name.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Name of a cluster that is made now.
    #[arg(long, value_name = "NAME", conflicts_with = "invite")]
    cluster_name: Option<String>,
    /// Load models that this Mac has when somebody asks for them, and unload them when nobody did for so long (10m when no time is
    /// given).
    ///
    /// What was not used for longest is unloaded when the room is needed; what was loaded with --pin stays. Without this, models are loaded
    /// by `mlxnode load` only.
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "10m", value_parser = duration)]
    load_on_demand: Option<Duration>,
    /// Send spans of requests (times and counts, never what was asked) to an OpenTelemetry collector, by OTLP over gRPC.
    #[arg(long, value_name = "http://HOST:PORT")]
    otlp_endpoint: Option<String>,
    /// Memory that models may use on this Mac, such as 48GB. Default: three quarters of it.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory_budget: Option<ByteCount>,
    /// Memory in which each model may remember prompts here, so that what begins as one before is answered sooner; 0 for none.
    ///
    /// Taken from what the model's weights and caches leave free of the budget. Default: a tenth of the budget.
    #[arg(long, value_name = "SIZE", value_parser = size_or_none)]
    prompt_cache_memory: Option<ByteCount>,
    /// Disk on which all models together may remember prompts here, over restarts as well, such as 50GB.
    ///
    /// Prompts can be read out of these files. They are in the data directory, for its owner only.
    #[arg(long, value_name = "SIZE", value_parser = size_or_none, default_value = "0")]
    prompt_cache_disk: ByteCount,
    /// Seconds that an answer waits for a lost node to come back; it goes on where it was. 0: it ends with an error at once.
    ///
    /// While the model is being loaded on the nodes that are there, answers wait as long as that takes.
    #[arg(long, value_name = "SECONDS", default_value_t = mlxnode_node::NodeOptions::DEFAULT_RESUME_WITHIN.as_secs(),
        value_parser = clap::value_parser!(u64).range(..=3600))]
    resume_within: u64,
}

/// What `--json` prints when the node is ready.
#[derive(Serialize)]
struct Ready<'a> {
    node_id: String,
    name: &'a str,
    cluster: &'a str,
    grpc: String,
    /// URL of the HTTP listener; `null` with --no-http.
    http: Option<String>,
}

/// How long the invite is good that a new cluster begins with.
const INVITE: Duration = Duration::from_secs(600);

impl Join {
    pub async fn run(self, global: &Global) -> Result<()> {
        let data_dir = data_dir(global)?;
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let listen = address("--listen", &self.listen, any)?;
        let http = match (&self.http, self.no_http) {
            (_, true) => None,
            (None, false) => Some(HttpOptions::local()),
            (Some(text), false) => {
                // A port alone is one of this machine's: other machines need keys.
                let listen = address("--http", text, IpAddr::V4(Ipv4Addr::LOCALHOST))?;
                Some(HttpOptions { listen, any_port_will_do: false, ..HttpOptions::local() })
            }
        };
        let worker_command =
            std::env::current_exe().context("cannot find my own executable for the workers")?;
        let mut options = NodeOptions::new(data_dir.root(), listen, worker_command, crate::hub::options());
        options.http = http.map(|http| HttpOptions {
            hosts: self.http_hosts,
            origins: self.http_origins,
            requires_key: self.require_key,
            ..http
        });
        options.name = self.name;
        options.otlp_endpoint = self.otlp_endpoint;
        options.job_reader = Some(Arc::new(TrainingReader));
        options.cluster_name = self.cluster_name;
        options.invite = self.invite;
        options.peers = self.peers;
        options.discovery = !self.no_discovery;
        options.memory_budget = self.memory_budget;
        options.load_on_demand = self.load_on_demand;
        options.prompt_cache_memory = self.prompt_cache_memory;
        options.prompt_cache_disk = self.prompt_cache_disk;
        options.resume_within = Duration::from_secs(self.resume_within);
        // Installed first, so that a signal during the start is not lost.
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
        let mut node = Node::start(options).await?;
        let ready = Ready {
            node_id: node.id().to_string(),
            name: node.name(),
            cluster: node.cluster_name(),
            grpc: node.grpc_address(),
            http: node.http(),
        };
        if global.json {
            output::json(&ready)?;
        } else {
            let address = node.addresses().first().unwrap_or(&ready.grpc);
            output::line(&format!("Node {} of cluster {} listens on {address}.", ready.name, ready.cluster))?;
            if let Some(http) = &ready.http {
                let moved = match node.http_moved() {
                    true => format!("   (port {} is taken)", HttpOptions::DEFAULT_PORT),
                    false => String::new(),
                };
                output::line(&format!("OpenAI and Anthropic clients:   {http}/v1{moved}"))?;
                output::line(&format!("In a browser:         {http}/"))?;
            }
            let invite = match node.founded() {
                // Whoever starts the first node wants a second one next.
                true => format!(
                    "mlxnode join --invite {}   (on it, within 10 minutes)",
                    node.invite(INVITE).await?
                ),
                false => "mlxnode invite".to_owned(),
            };
            output::line(&format!(
                "Let another Mac in:   {invite}\nSee who is here:      mlxnode status\nStop this node:       Ctrl-C"
            ))?;
        }
        let ended = tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            ended = node.ended() => ended,
        };
        node.shutdown().await;
        Ok(ended?)
    }
}

/// HOST:PORT, :PORT or PORT (then on `any`) as an address to bind.
fn address(flag: &str, text: &str, any: IpAddr) -> Result<SocketAddr> {
    if let Ok(port) = text.trim_start_matches(':').parse::<u16>() {
        return Ok(SocketAddr::new(any, port));
    }
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    match text.to_socket_addrs().ok().and_then(|mut found| found.next()) {
        Some(address) => Ok(address),
        None => bail!("{flag} {text:?} is not ADDRESS:PORT, such as 0.0.0.0:7420 or 127.0.0.1:0"),
    }
}

/// A size, or 0.
fn size_or_none(text: &str) -> Result<ByteCount, String> {
    if text.trim() == "0" { Ok(ByteCount(0)) } else { size(text) }
}

/// "48GB", "512 MiB", "1500000000".
fn size(text: &str) -> Result<ByteCount, String> {
    let digits =
        text.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("{unit:?} is no unit; use MB, GB, MiB or GiB")),
    };
    match number.parse::<f64>() {
        Ok(number) if number * factor >= 1.0 && number * factor < 1e18 => {
            Ok(ByteCount((number * factor) as u64))
        }
        _ => Err("a size is a number and a unit, such as 48GB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        let cases = [("48GB", 48_000_000_000), ("1.5 GiB", 1_610_612_736), ("512", 512), ("3MB", 3_000_000)];
        for (text, bytes) in cases {
            assert_eq!(size(text), Ok(ByteCount(bytes)), "{text}");
            assert_eq!(size_or_none(text), Ok(ByteCount(bytes)), "{text}");
        }
        assert_eq!(size_or_none("0"), Ok(ByteCount(0)));
        for text in ["", "GB", "-1GB", "12 parsecs", "1e99GB", "0"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_port_alone_listens_on_all_interfaces() {
        let address = |text| address("--listen", text, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        assert_eq!(address("7420").unwrap(), "0.0.0.0:7420".parse().unwrap());
        assert_eq!(address(":80").unwrap(), "0.0.0.0:80".parse().unwrap());
        assert!(address("nowhere").is_err());
    }
}
