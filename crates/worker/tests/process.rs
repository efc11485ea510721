//! Workers as processes of their own: start, hello, kill -9, the death of the node.
//!
//! This program is all three parties: without arguments the test, with `worker` the process `mlxnode worker` with simulated
//! stages, with `node` a node that holds one worker until it is killed.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop
#![allow(clippy::print_stdout)] // it speaks for the test harness, and as a node to the test

mod replica;

use mlxnode_cluster::Identity;
use mlxnode_compute::simulated::SimulatedStage;
use mlxnode_compute::{LayerRange, SequenceId};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_worker::{
    DriveClient, DriveError, LoadShard, ProcessError, SpawnWorker, WorkerOptions, WorkerProcess,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use replica::{Heard, Model, VOCABULARY, neighbour, pins, spec};
use std::io::{BufRead as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let role = std::env::args().nth(1).unwrap_or_default();
    match role.as_str() {
        "worker" => return worker(),
        "node" => node(),
        _ => {}
    }
    let tests: [(&str, fn()); 7] = [
        ("a_worker_starts_loads_and_stops", a_worker_starts_loads_and_stops),
        ("kill_9_in_the_middle_is_noticed_at_once", kill_9_in_the_middle_is_noticed_at_once),
        ("the_death_of_the_node_ends_the_worker", the_death_of_the_node_ends_the_worker),
        (
            "a_worker_whose_log_is_closed_too_ends_in_good_order",
            a_worker_whose_log_is_closed_too_ends_in_good_order,
        ),
        ("a_stuck_worker_is_killed", a_stuck_worker_is_killed),
        ("what_is_no_worker_is_refused", what_is_no_worker_is_refused),
        ("a_worker_without_a_node_says_so", a_worker_without_a_node_says_so),
    ];
    let names: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for (name, test) in tests {
        if names.is_empty() || names.iter().any(|wanted| name.contains(wanted.as_str())) {
            test(); // a failure panics, and the program ends with it
            println!("test {name} ... ok");
        }
    }
    ExitCode::SUCCESS
}

fn worker() -> ExitCode {
    let step_time = std::env::args().nth(2).and_then(|micros| micros.parse().ok()).unwrap_or(0);
    let model = Model { step_time: Duration::from_micros(step_time), ..Model::default() };
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match mlxnode_worker::run(WorkerOptions::default(), model.factory()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Prints its worker's pid and address and waits to be killed.
fn node() {
    block_on(async {
        let identity = Identity::generate().unwrap();
        let process = WorkerProcess::spawn(options(0), &identity).await.unwrap();
        println!("{} {}", process.pid(), process.address());
        std::future::pending::<()>().await;
    });
}

fn block_on(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let bounded =
        async { tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs") };
    runtime.block_on(bounded);
}

fn options(step_micros: u64) -> SpawnWorker {
    SpawnWorker {
        command: std::env::current_exe().unwrap(),
        arguments: vec!["worker".into(), step_micros.to_string().into()],
        listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
        name: "test".into(),
    }
}

fn shard(layers: LayerRange, layer_count: usize) -> LoadShard {
    let model = Model::default();
    LoadShard {
        folder: "/model".into(),
        layers,
        layer_count,
        context_tokens: model.context_tokens,
        max_sequences: model.max_sequences,
        prefill_chunk: model.prefill_chunk,
        blocks: None,
        guessing: None,
    }
}

async fn load(process: &WorkerProcess, layers: LayerRange, layer_count: usize) {
    let mut loading = process.load(&shard(layers, layer_count), 1).await.unwrap();
    while !loading.next().await.unwrap().loaded {}
}

/// Is nobody listening there any more, within `bound`?
fn is_gone(address: SocketAddr, bound: Duration) -> bool {
    let began = Instant::now();
    while began.elapsed() < bound {
        if TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn a_worker_starts_loads_and_stops() {
    block_on(async {
        let identity = Identity::generate().unwrap();
        let process = WorkerProcess::spawn(options(0), &identity).await.unwrap();
        assert_eq!((process.exit(), process.pid() == std::process::id()), (None, false));
        load(&process, LayerRange::new(0, 4), 4).await;
        let again = process.load(&shard(LayerRange::new(0, 4), 4), 1).await;
        assert!(matches!(again, Err(ProcessError::Refused(_))), "{again:?}");
        let links = proto::WorkerLinks { drivers: pins(&identity), ..Default::default() };
        process.set_links(links).await.unwrap();

        let address = process.address().to_string();
        let (client, mut events) =
            DriveClient::connect(&address, process.key_pin(), &identity).await.unwrap();
        client.open(SequenceId(1), vec![1, 2], spec(&[1, 2], 5)).await.unwrap();
        let mut heard = Heard::default();
        heard.until_closed(&mut events, 1).await;
        let expected = SimulatedStage::expected_tokens(&[1, 2], 5, VOCABULARY);
        assert_eq!(heard.tokens[&SequenceId(1)], expected);
        let stats = process.stats().await.unwrap();
        assert_eq!((stats.steps, stats.open_sequences, stats.active_bytes), (5, 0, 1000));

        let began = Instant::now();
        let exit = process.stop().await;
        assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit}");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert!(matches!(events.next().await, Err(DriveError::Lost(_))));
        assert!(matches!(process.stats().await, Err(ProcessError::Ended(_))));
    });
}

fn kill_9_in_the_middle_is_noticed_at_once() {
    block_on(async {
        let identity = Identity::generate().unwrap();
        let mut processes = Vec::new();
        for index in 0..3 {
            let process = WorkerProcess::spawn(options(1000), &identity).await.unwrap();
            load(&process, LayerRange::new(index, index + 1), 3).await;
            processes.push(process);
        }
        let at = |index: usize| {
            let process = &processes[index % 3];
            Some(neighbour(&process.address().to_string(), process.key_pin()))
        };
        for (index, process) in processes.iter().enumerate() {
            let links =
                proto::WorkerLinks { next: at(index + 1), previous: at(index + 2), drivers: pins(&identity) };
            process.set_links(links).await.unwrap();
        }
        let first = &processes[0];
        let address = first.address().to_string();
        let (client, mut events) = DriveClient::connect(&address, first.key_pin(), &identity).await.unwrap();
        client.open(SequenceId(1), vec![1], spec(&[1], 4000)).await.unwrap();
        let mut heard = Heard::default();
        while heard.tokens.get(&SequenceId(1)).is_none_or(|tokens| tokens.len() < 3) {
            heard.hear(events.next().await.unwrap());
        }

        let pid = i32::try_from(processes[1].pid()).unwrap();
        let killed = Instant::now();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        let exit = processes[1].wait().await;
        assert_eq!((exit.signal, exit.reason.as_str()), (Some(9), "ended with signal 9"));
        loop {
            match events.next().await {
                Ok(event) => heard.hear(event),
                Err(error) => break assert!(matches!(error, DriveError::Lost(_)), "{error}"),
            }
        }
        assert_eq!(heard.failures.len(), 1);
        for process in [&processes[0], &processes[2]] {
            let exit = process.wait().await;
            assert_eq!(exit.code, Some(71), "{exit}");
            assert!(exit.to_string().contains("is lost"), "{exit}");
        }
        assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    });
}

fn the_death_of_the_node_ends_the_worker() {
    let mut node =
        Command::new(std::env::current_exe().unwrap()).arg("node").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufReader::new(node.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (_pid, address) = line.trim().split_once(' ').unwrap();
    let address: SocketAddr = address.parse().unwrap();
    assert!(TcpStream::connect(address).is_ok());
    node.kill().unwrap(); // SIGKILL: the node cannot say goodbye
    node.wait().unwrap();
    assert!(is_gone(address, Duration::from_secs(5)), "the worker outlives its node");
}

fn a_worker_whose_log_is_closed_too_ends_in_good_order() {
    let mut worker = Command::new(std::env::current_exe().unwrap())
        .arg("worker")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let hello = format!(
        r#"{{"parent_key_pin":"{}","listen":"127.0.0.1","protocol":{},"release":"test"}}"#,
        "ab".repeat(32),
        mlxnode_proto::PROTOCOL_VERSION
    );
    let mut stdin = worker.stdin.take().unwrap();
    writeln!(stdin, "{hello}").unwrap();
    let mut ready = String::new();
    std::io::BufReader::new(worker.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    assert!(ready.contains("\"key_pin\""), "{ready}");
    drop(worker.stderr.take());
    drop(stdin); // all pipes at once, as when the node is killed
    assert_eq!(worker.wait().unwrap().code(), Some(0));
}

fn a_stuck_worker_is_killed() {
    block_on(async {
        let identity = Identity::generate().unwrap();
        // It never reads its stdin nor ends on SIGTERM.
        let script = "trap '' TERM; echo 'not a hello'; while :; do sleep 1; done";
        let stuck = SpawnWorker {
            command: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            ..options(0)
        };
        let refused = WorkerProcess::spawn(stuck, &identity).await;
        assert!(matches!(&refused, Err(ProcessError::Hello(_))), "{refused:?}");

        // A step of a minute: it closes its listener but cannot drop the stage.
        let process = WorkerProcess::spawn(options(60_000_000), &identity).await.unwrap();
        load(&process, LayerRange::new(0, 4), 4).await;
        let links = proto::WorkerLinks { drivers: pins(&identity), ..Default::default() };
        process.set_links(links).await.unwrap();
        let address = process.address().to_string();
        let (client, _events) = DriveClient::connect(&address, process.key_pin(), &identity).await.unwrap();
        client.open(SequenceId(1), vec![1], spec(&[1], 5)).await.unwrap();
        while process.stats().await.unwrap().step_time.is_zero() {}
        let began = Instant::now();
        process.stop().await;
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    });
}

fn what_is_no_worker_is_refused() {
    block_on(async {
        let identity = Identity::generate().unwrap();
        let missing = SpawnWorker { command: "/nonexistent/mlxnode".into(), ..options(0) };
        let error = WorkerProcess::spawn(missing, &identity).await.expect_err("no such file");
        assert_eq!(error.to_string(), "cannot start /nonexistent/mlxnode");
        let script = "echo 'the library is missing' >&2; exit 3";
        let broken = SpawnWorker {
            command: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            ..options(0)
        };
        let error = WorkerProcess::spawn(broken, &identity).await.expect_err("it ends at once").to_string();
        assert!(error.ends_with("ended with code 3 (the library is missing)"), "{error}");
    });
}

fn a_worker_without_a_node_says_so() {
    let run = |stdin: Stdio| {
        let worker =
            Command::new(std::env::current_exe().unwrap()).arg("worker").stdin(stdin).output().unwrap();
        (worker.status.code(), String::from_utf8(worker.stderr).unwrap())
    };
    let (code, text) = run(Stdio::null());
    assert_eq!(code, Some(64));
    assert!(text.contains("try `mlxnode join`"), "{text}");
    let (code, text) = run(Stdio::piped());
    assert_eq!(code, Some(64));
    assert!(text.contains("the pipe was closed before it"), "{text}");
}
