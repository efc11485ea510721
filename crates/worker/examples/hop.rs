//! What the transport costs: a decode hop of 8 KiB against a raw TLS round trip, and two stages against one.
//!
//! `cargo run --release -p mlxnode-worker --example hop [SECONDS]` prints one line of JSON. Everything is interleaved (A B A B) and
//! runs over loopback with mutual TLS; each worker has its own network thread and its own compute thread, as its process has.
//!
//! - `hop_us`: from the return of a step in one compute thread to the start of the next stage's step in the other one, through
//!   outbox, link and inbox. Decode of one sequence, 8 KiB a token.
//! - `step_us`: a whole decode step of two stages that compute nothing: hop, ring and driver, as the scheduler sees it.
//! - `raw_us`: 8 KiB there and 8 KiB back over tokio and rustls, without gRPC.
//! - `throughput`: tokens per second of stages that burn CPU, several sequences in flight. Means something on idle cores only.
//! - `overlap`: the same with stages that sleep for 4 ms a token in all, so that a busy machine changes little.
#![allow(clippy::unwrap_used, clippy::panic)] // a measurement that cannot be made stops
#![allow(clippy::print_stdout)] // the result is data on stdout

#[path = "../tests/replica/mod.rs"]
mod replica;

use bytes::Bytes;
use mlxnode_compute::{
    Activation, BatchOutput, BlockStore, ByteCount, Dtype, MicroBatch, Row, RowOutput, Sampled, SequenceId,
    SequenceSpec, Stage, StageError, StageInfo, StageMemory,
};
use mlxnode_worker::{DriveClient, DriveEvent, DriveEvents, StageFactory};
use replica::{Model, Replica, spec};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};

/// Width of the activation: 2048 f32 are 8 KiB.
const HIDDEN: usize = 2048;
const PAYLOAD: usize = HIDDEN * 4;
/// Decode steps, and raw round trips, of one turn.
const TURN: usize = 300;

fn main() {
    let seconds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(10.0);
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let transport = runtime.block_on(measure_hops(Duration::from_secs_f64(seconds)));
    let how_long = Duration::from_secs_f64(seconds);
    let throughput = runtime.block_on(measure_throughput("throughput", a_millisecond_of_work(), how_long));
    let overlap = Load::Sleep(Duration::from_millis(4));
    let overlap = runtime.block_on(measure_throughput("overlap", overlap, how_long));
    println!("{{\"payload_bytes\":{PAYLOAD},{transport},{throughput},{overlap}}}");
}

/// When the first stage returned last, and how long each hop took.
#[derive(Default)]
struct Clock {
    returned: Option<Instant>,
    hops: Vec<Duration>,
}

/// Computes nothing, or burns CPU; hands on 8 KiB a token; notes when.
struct Timed {
    info: StageInfo,
    clock: Arc<Mutex<Clock>>,
    load: Load,
    row: Bytes,
}

impl Stage for Timed {
    fn info(&self) -> &StageInfo {
        &self.info
    }
    fn open(&mut self, _: SequenceId, _: SequenceSpec) -> Result<(), StageError> {
        Ok(())
    }
    fn run(&mut self, batch: &MicroBatch) -> Result<BatchOutput, StageError> {
        if !self.info.is_first() {
            let arrived = Instant::now();
            let mut clock = self.clock.lock().unwrap();
            if let Some(returned) = clock.returned.take() {
                clock.hops.push(arrived - returned);
            }
        }
        let tokens = batch.tokens();
        (0..tokens).for_each(|_| self.load.carry());
        let is_last = self.info.is_last();
        let sampled = |row: &Row| is_last && row.sample;
        let output = |row: &Row| RowOutput {
            sampled: sampled(row).then(|| Sampled { token: 1, logprob: None, top: vec![] }),
            ..RowOutput::default()
        };
        let rows = batch.rows.iter().map(|row| Ok(output(row))).collect();
        if is_last {
            return Ok(BatchOutput { rows, activation: None });
        }
        let bytes = match tokens {
            1 => self.row.clone(),
            tokens => Bytes::from(self.row.repeat(tokens)),
        };
        let activation = Some(Activation::new(tokens, HIDDEN, Dtype::F32, bytes)?);
        self.clock.lock().unwrap().returned = Some(Instant::now());
        Ok(BatchOutput { rows, activation })
    }
    fn close(&mut self, _: SequenceId) {}
    fn blocks(&mut self) -> Option<&mut dyn BlockStore> {
        None
    }
    fn load_adapter(&mut self, name: &str, _: &std::path::Path) -> Result<(), StageError> {
        Err(StageError::Adapter(format!("nothing is computed here that {name} could change")))
    }
    fn unload_adapter(&mut self, _: &str) {}
    fn memory(&self) -> StageMemory {
        StageMemory::default()
    }
}

/// What a step of a stage does.
#[derive(Clone, Copy)]
enum Load {
    Burn(u64),
    Sleep(Duration),
}

impl Load {
    fn carry(self) {
        match self {
            Self::Burn(rounds) => burn(rounds),
            Self::Sleep(time) => std::thread::sleep(time),
        }
    }

    /// One half of it.
    fn half(self) -> Self {
        match self {
            Self::Burn(rounds) => Self::Burn(rounds / 2),
            Self::Sleep(time) => Self::Sleep(time / 2),
        }
    }
}

/// A fixed amount of work for one core.
fn burn(rounds: u64) {
    let mut value = 1_u64;
    for round in 0..rounds {
        value = std::hint::black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round));
    }
}

fn timed(clock: &Arc<Mutex<Clock>>, load: Load) -> StageFactory {
    let clock = clock.clone();
    Box::new(move |shard, _| {
        let info = StageInfo {
            layers: shard.layers,
            layer_count: shard.layer_count,
            hidden: HIDDEN,
            dtype: Dtype::F32,
            vocabulary: 1000,
            weights: ByteCount(0),
        };
        Ok(Box::new(Timed { info, clock, load, row: Bytes::from(vec![1; PAYLOAD]) }))
    })
}

/// A network thread, as a worker process has one.
fn network_thread() -> Handle {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let handle = runtime.handle().clone();
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
}

async fn replica_of(loads: &[Load], clock: &Arc<Mutex<Clock>>) -> Replica {
    let runtimes: Vec<_> = loads.iter().map(|_| network_thread()).collect();
    let factories = loads.iter().map(|load| timed(clock, *load)).collect();
    let model = Model { hidden: HIDDEN, context_tokens: 1 << 20, ..Model::default() };
    Replica::start_on(&runtimes, factories, model).await
}

async fn measure_hops(how_long: Duration) -> String {
    let clock = Arc::new(Mutex::new(Clock::default()));
    let replica = replica_of(&[Load::Burn(0), Load::Burn(0)], &clock).await;
    let (client, mut events) = replica.drive().await;
    let mut raw = RawTls::connect().await;
    let (mut steps, mut round_trips, mut sequence) = (Vec::new(), Vec::new(), 0);
    let began = Instant::now();
    while began.elapsed() < how_long {
        sequence += 1;
        steps.extend(decode(&client, &mut events, sequence).await);
        for _ in 0..TURN {
            round_trips.push(raw.round_trip().await);
        }
        if sequence == 1 {
            // The first turn warms both up.
            steps.clear();
            round_trips.clear();
            clock.lock().unwrap().hops.clear();
        }
    }
    let mut hops = std::mem::take(&mut clock.lock().unwrap().hops);
    let (hop, step, raw) = (Spread::of(&mut hops), Spread::of(&mut steps), Spread::of(&mut round_trips));
    format!(
        "\"hop_us\":{},\"step_us\":{},\"raw_us\":{},\"hop_to_raw_p50\":{:.2},\"hop_to_raw_p99\":{:.2},\"step_to_raw_p50\":{:.2}",
        hop.json(),
        step.json(),
        raw.json(),
        hop.p50 / raw.p50,
        hop.p99 / raw.p99,
        step.p50 / raw.p50
    )
}

/// The times between the tokens of one sequence.
async fn decode(client: &DriveClient, events: &mut DriveEvents, sequence: u64) -> Vec<Duration> {
    client.open(SequenceId(sequence), vec![1], spec(&[1], TURN + 1)).await.unwrap();
    let (mut times, mut last) = (Vec::with_capacity(TURN), None);
    loop {
        match events.next().await.unwrap() {
            DriveEvent::Token(_) => {
                let now = Instant::now();
                if let Some(last) = last.replace(now) {
                    times.push(now - last);
                }
            }
            DriveEvent::Closed { .. } => return times,
            DriveEvent::Failed { reason, .. } => panic!("{reason}"),
            _ => {}
        }
    }
}

/// Work that takes one core about a millisecond, as all layers of a small model do.
fn a_millisecond_of_work() -> Load {
    let began = Instant::now();
    burn(10_000_000);
    Load::Burn((1e-3 / began.elapsed().as_secs_f64() * 1e7) as u64)
}

async fn measure_throughput(name: &str, load: Load, how_long: Duration) -> String {
    let clock = Arc::new(Mutex::new(Clock::default()));
    let one = replica_of(&[load], &clock).await;
    let two = replica_of(&[load.half(), load.half()], &clock).await;
    let (mut one_drive, mut two_drive) = (one.drive().await, two.drive().await);
    let (mut rates_of_one, mut rates_of_two, mut rates_of_four) = (Vec::new(), Vec::new(), Vec::new());
    let (mut sequence, began) = (0, Instant::now());
    while began.elapsed() < how_long {
        rates_of_one.push(rate(&one_drive.0, &mut one_drive.1, &mut sequence, 2).await);
        rates_of_two.push(rate(&two_drive.0, &mut two_drive.1, &mut sequence, 2).await);
        rates_of_four.push(rate(&two_drive.0, &mut two_drive.1, &mut sequence, 4).await);
    }
    let (one, two, four) = (median(rates_of_one), median(rates_of_two), median(rates_of_four));
    format!(
        "\"{name}\":{{\"one_stage\":{one:.0},\"two_stages_2_requests\":{two:.0},\"two_stages_4_requests\":{four:.0},\
         \"ratio_2\":{:.2},\"ratio_4\":{:.2}}}",
        two / one,
        four / one
    )
}

/// Tokens per second of `requests` sequences that run together.
async fn rate(client: &DriveClient, events: &mut DriveEvents, sequence: &mut u64, requests: usize) -> f64 {
    const TOKENS: usize = 200;
    let began = Instant::now();
    for _ in 0..requests {
        *sequence += 1;
        client.open(SequenceId(*sequence), vec![1], spec(&[1], TOKENS)).await.unwrap();
    }
    let mut closed = 0;
    while closed < requests {
        if let DriveEvent::Closed { .. } = events.next().await.unwrap() {
            closed += 1;
        }
    }
    (requests * TOKENS) as f64 / began.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Spread {
    p50: f64,
    p99: f64,
    count: usize,
}

impl Spread {
    fn of(times: &mut [Duration]) -> Self {
        times.sort();
        let at = |part: usize| times[times.len() * part / 100].as_nanos() as f64 / 1e3;
        Self { p50: at(50), p99: at(99), count: times.len() }
    }

    fn json(&self) -> String {
        format!("{{\"p50\":{:.1},\"p99\":{:.1},\"count\":{}}}", self.p50, self.p99, self.count)
    }
}

/// A TLS connection without gRPC to an echo on a thread of its own.
struct RawTls {
    stream: tokio_rustls::client::TlsStream<TcpStream>,
    payload: Vec<u8>,
}

impl RawTls {
    async fn connect() -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let certified = || rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let (server, client) = (certified(), certified());
        let trust = |certified: &rcgen::CertifiedKey<rcgen::KeyPair>| {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(certified.cert.der().clone()).unwrap();
            Arc::new(roots)
        };
        let key = |certified: &rcgen::CertifiedKey<rcgen::KeyPair>| {
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der()))
        };
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(trust(&client), provider.clone());
        let server_config = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(vec![server.cert.der().clone()], key(&server))
            .unwrap();
        let client_config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(trust(&server))
            .with_client_auth_cert(vec![client.cert.der().clone()], key(&client))
            .unwrap();

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        network_thread().spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            let (tcp, _) = listener.accept().await.unwrap();
            tcp.set_nodelay(true).unwrap();
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server_config));
            let mut stream = acceptor.accept(tcp).await.unwrap();
            let mut payload = vec![0; PAYLOAD];
            while stream.read_exact(&mut payload).await.is_ok() {
                stream.write_all(&payload).await.unwrap();
                stream.flush().await.unwrap();
            }
        });
        let tcp = TcpStream::connect(address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client_config));
        let stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
        Self { stream, payload: vec![7; PAYLOAD] }
    }

    async fn round_trip(&mut self) -> Duration {
        let began = Instant::now();
        self.stream.write_all(&self.payload).await.unwrap();
        self.stream.flush().await.unwrap();
        self.stream.read_exact(&mut self.payload).await.unwrap();
        began.elapsed()
    }
}
