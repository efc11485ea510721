//! What adding up gradients of two processes costs, against the bare transport that carries as many bytes.
//!
//! `cargo run --release -p mlxnode-worker --example reduce [ROUNDS [MEGABYTES]]` prints one line of JSON. Two processes, loopback,
//! in turns:
//!
//! - `reduce`: both have a gradient of so many bytes; the time until both have the sum. Each sends as many bytes as the gradient has:
//!   half as its part of the other's slice, half as the sum of its own.
//! - `tcp`: each sends as many bytes to the other at the same time, over one TCP connection.
//! - `tls`: the same over TLS 1.3, with keys on both sides.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a measurement that cannot be made stops
#![allow(clippy::print_stdout)] // the result is data on stdout

use bytes::Bytes;
use data_encoding::HEXLOWER;
use mlxnode_cluster::{Identity, KeyPin};
use mlxnode_collective::{MemberId, RoundsOptions};
use mlxnode_compute::{Partial, Reduce, Reduced, Tally, Turn, nodes_of};
use mlxnode_worker::{CollectiveEndpoint, CollectiveOptions, Group, GroupConductor, GroupPeer, GroupWorker};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// A micro-batch for each process.
const MICRO_BATCHES: u32 = 2;
/// What is handed to the system at once.
const WRITE: usize = 1 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--second") {
        return second(&arguments[1..]);
    }
    let number = |at: usize, default| arguments.get(at).map_or(default, |text| text.parse().unwrap());
    let (rounds, megabytes) = (number(0, 5), number(1, 100));
    println!("{}", first(rounds, megabytes * 1_000_000 / 4));
}

/// A network thread for the bare transports; the group has one of its own.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// The process that measures: one of the two, and the node that brings them together.
fn first(rounds: usize, values: usize) -> String {
    let node_runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let node = Arc::new(Identity::generate().unwrap());
    let runtime = runtime();
    let (ours, theirs) = (certified(), certified());
    let (tcp_listener, tls_listener) = runtime.block_on(async {
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap())
    });
    let endpoint = endpoint(1, node.key_pin());
    let mut other = Other::start(&[
        node.key_pin().to_string(),
        values.to_string(),
        tcp_listener.local_addr().unwrap().to_string(),
        tls_listener.local_addr().unwrap().to_string(),
        HEXLOWER.encode(ours.cert.der()),
        HEXLOWER.encode(theirs.cert.der()),
        HEXLOWER.encode(&theirs.signing_key.serialize_der()),
    ]);
    let (mut tcp, mut tls) = runtime.block_on(async {
        let tcp = tcp_listener.accept().await.unwrap().0;
        tcp.set_nodelay(true).unwrap();
        let socket = tls_listener.accept().await.unwrap().0;
        socket.set_nodelay(true).unwrap();
        let acceptor = TlsAcceptor::from(server_config(&ours, theirs.cert.der()));
        (tcp, TlsStream::from(acceptor.accept(socket).await.unwrap()))
    });

    let options = RoundsOptions { expected: 2, ..RoundsOptions::default() };
    let conductor = node_runtime.block_on(async {
        let (conductor, events) = GroupConductor::start(options, 0, node.clone());
        for (member, address, key_pin) in
            [(1, endpoint.address(), endpoint.key_pin()), (2, other.address, other.key_pin)]
        {
            let peer = GroupPeer { address: address.to_string(), key_pin };
            conductor.add(GroupWorker { member: MemberId(member), control: address, peer }).await;
        }
        (conductor, events)
    });
    let mut part = Part::new(&endpoint, values);
    let (mut reduce, mut raw_tcp, mut raw_tls) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let times = [
            timed(&mut other, "tcp", || runtime.block_on(exchange(&mut tcp, values * 4))),
            timed(&mut other, "tls", || runtime.block_on(exchange(&mut tls, values * 4))),
            timed(&mut other, "reduce", || part.reduce()),
        ];
        // The first turn warms everything up.
        if round > 0 {
            raw_tcp.push(times[0]);
            raw_tls.push(times[1]);
            reduce.push(times[2]);
        }
    }
    drop(conductor);
    format!(
        "{{\"bytes\":{},\"reduce_s\":{reduce:?},\"tcp_s\":{raw_tcp:?},\"tls_s\":{raw_tls:?}}}",
        values * 4
    )
}

/// From the word until both are through.
fn timed(other: &mut Other, what: &str, ours: impl FnOnce()) -> f64 {
    let began = Instant::now();
    other.say(what);
    ours();
    assert_eq!(other.hear(), "done");
    began.elapsed().as_secs_f64()
}

/// The other process: does what it is told, line by line.
fn second(arguments: &[String]) {
    let hex = |at: usize| HEXLOWER.decode(arguments[at].as_bytes()).unwrap();
    let parent = KeyPin::from_bytes(hex(0).try_into().unwrap());
    let values: usize = arguments[1].parse().unwrap();
    let runtime = runtime();
    let (mut tcp, mut tls) = runtime.block_on(async {
        let tcp = TcpStream::connect(&arguments[2]).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let socket = TcpStream::connect(&arguments[3]).await.unwrap();
        socket.set_nodelay(true).unwrap();
        let connector = TlsConnector::from(client_config(&hex(4).into(), hex(5).into(), hex(6)));
        let name = ServerName::try_from("localhost").unwrap();
        (tcp, TlsStream::from(connector.connect(name, socket).await.unwrap()))
    });
    let endpoint = endpoint(2, parent);
    println!("{} {}", endpoint.address(), endpoint.key_pin());
    let mut part = None;
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "tcp" => runtime.block_on(exchange(&mut tcp, values * 4)),
            "tls" => runtime.block_on(exchange(&mut tls, values * 4)),
            _ => part.get_or_insert_with(|| Part::new(&endpoint, values)).reduce(),
        }
        println!("done");
    }
}

fn endpoint(member: u64, parent: KeyPin) -> CollectiveEndpoint {
    let folder = std::env::temp_dir().join("mlxnode-reduce"); // states only, of which there are none
    let options = CollectiveOptions::new(IpAddr::from(Ipv4Addr::LOCALHOST), folder);
    CollectiveEndpoint::start(options, MemberId(member), parent).unwrap()
}

/// A trainer that has its gradient already.
struct Part {
    group: Group,
    values: Bytes,
    steps: u64,
}

impl Part {
    fn new(endpoint: &CollectiveEndpoint, values: usize) -> Self {
        let gradient: Vec<u8> = (0..values).flat_map(|at| (at as f32).to_le_bytes()).collect();
        Self { group: endpoint.join(values, MICRO_BATCHES), values: gradient.into(), steps: 0 }
    }

    fn reduce(&mut self) {
        let Ok(Turn::Deal(deal)) = self.group.begin(self.steps) else { panic!("a deal was expected") };
        let tally = Tally { loss: 1.0, tokens: 1 };
        let partials = nodes_of(&deal.run, MICRO_BATCHES).into_iter();
        let partials = partials.map(|node| Partial { node, values: self.values.clone(), tally }).collect();
        let Ok(Reduced::Sum(sum)) = self.group.reduce(&deal, partials) else { panic!("a sum was expected") };
        assert_eq!(sum.values[4..8], 2.0_f32.to_le_bytes());
        self.steps += 1;
    }
}

/// The second process, seen from the first.
struct Other {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    address: SocketAddr,
    key_pin: KeyPin,
}

impl Other {
    fn start(arguments: &[String]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("--second").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let orders = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        let (address, pin) = line.trim().split_once(' ').unwrap();
        let pin = HEXLOWER.decode(pin.as_bytes()).unwrap().try_into().unwrap();
        let (address, key_pin) = (address.parse().unwrap(), KeyPin::from_bytes(pin));
        Self { child, orders, answers, address, key_pin }
    }

    fn say(&mut self, what: &str) {
        writeln!(self.orders, "{what}").unwrap();
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// So many bytes each way at the same time.
async fn exchange(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), bytes: usize) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let writing = async {
        let piece = vec![1; WRITE];
        let mut left = bytes;
        while left > 0 {
            let count = left.min(WRITE);
            writer.write_all(&piece[..count]).await.unwrap();
            left -= count;
        }
        writer.flush().await.unwrap();
    };
    let reading = async {
        let mut piece = vec![0; WRITE];
        let mut left = bytes;
        while left > 0 {
            let most = left.min(WRITE);
            let count = reader.read(&mut piece[..most]).await.unwrap();
            assert!(count > 0, "the other side has gone");
            left -= count;
        }
    };
    tokio::join!(writing, reading);
}

type Certified = rcgen::CertifiedKey<rcgen::KeyPair>;

fn certified() -> Certified {
    rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap()
}

fn trust(certificate: &CertificateDer<'static>) -> Arc<rustls::RootCertStore> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    Arc::new(roots)
}

fn key(der: Vec<u8>) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from(PrivatePkcs8KeyDer::from(der))
}

fn server_config(ours: &Certified, theirs: &CertificateDer<'static>) -> Arc<rustls::ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(trust(theirs), provider.clone());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![ours.cert.der().clone()], key(ours.signing_key.serialize_der()))
        .unwrap();
    Arc::new(config)
}

fn client_config(
    theirs: &CertificateDer<'static>,
    ours: CertificateDer<'static>,
    our_key: Vec<u8>,
) -> Arc<rustls::ClientConfig> {
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(trust(theirs))
            .with_client_auth_cert(vec![ours], key(our_key))
            .unwrap();
    Arc::new(config)
}
