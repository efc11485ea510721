//! What a worker refuses: strangers, whoever asks what is not theirs to ask, malformed frames, models that do not load.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod replica;

use bytes::Bytes;
use mlxnode_cluster::{ConnectOptions, ExpectedKey, Identity, connect};
use mlxnode_compute::LayerRange;
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::frame::Body;
use mlxnode_proto::internal::v1::stage_client::StageClient;
use mlxnode_proto::internal::v1::worker_client::WorkerClient;
use mlxnode_worker::{DriveClient, DriveError, Fault, Side, StageFactory, WorkerOptions};
use replica::{EPOCH, Member, Model, channel, neighbour, pins};
use std::time::Duration;
use tokio::net::TcpListener;
use tonic::Code;

/// A worker of a middle stage with neighbours that the test plays.
struct Middle {
    node: Identity,
    previous: Identity,
    driver: Identity,
    member: Member,
    /// The next stage: reachable, silent.
    _next: TcpListener,
}

async fn middle(layers: LayerRange, options: WorkerOptions) -> Middle {
    let [node, previous, next, driver] = std::array::from_fn(|_| Identity::generate().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut member = Member::start(&node, Model::default().factory(), options).await;
    member.load(Model::default().shard(layers, 6)).await.unwrap();
    let links = proto::WorkerLinks {
        next: Some(neighbour(&listener.local_addr().unwrap().to_string(), next.key_pin())),
        previous: Some(neighbour("127.0.0.1:1", previous.key_pin())),
        drivers: pins(&driver),
    };
    member.client.set_links(links).await.unwrap();
    Middle { node, previous, driver, member, _next: listener }
}

async fn code_of_link(middle: &Middle, identity: &Identity, frames: Vec<proto::Frame>) -> (Code, String) {
    let mut client = StageClient::new(channel(&middle.member.worker, identity).await);
    // The stream stays open after the frames, as a neighbour's does.
    let outgoing = futures::StreamExt::chain(futures::stream::iter(frames), futures::stream::pending());
    let linked = async {
        let mut credits = client.link(outgoing).await?.into_inner();
        while credits.message().await?.is_some() {}
        Ok::<_, tonic::Status>(())
    };
    let outcome = tokio::time::timeout(Duration::from_secs(5), linked).await.expect("no answer");
    let status = outcome.expect_err("the link ends with a status");
    (status.code(), status.message().to_owned())
}

fn frame(epoch: u64, body: Body) -> proto::Frame {
    proto::Frame { epoch, body: Some(body) }
}

fn batch() -> proto::BatchFrame {
    let row =
        |sequence| proto::BatchRow { sequence, position: 0, tokens: vec![1], sample: true, guesses: vec![] };
    proto::BatchFrame {
        number: 1,
        rows: vec![row(1), row(2)],
        dtype: proto::Dtype::F32 as i32,
        shape: vec![2, 4],
        data: Bytes::from(vec![0; 32]),
        ..proto::BatchFrame::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_do_not_fit_end_the_link_and_the_worker() {
    let close = || Body::Close(proto::CloseSequence { sequence: 1 });
    let oversized = proto::BatchFrame { data: Bytes::from(vec![0; 2 << 20]), ..batch() };
    let huge = proto::BatchFrame { shape: vec![2, u32::MAX], ..batch() };
    let mut too_many = batch();
    too_many.rows[1].tokens = vec![0; 700];
    let mut guessing = batch();
    guessing.rows[1].tokens = vec![0; 2];
    guessing.rows[1].guesses = vec![0; 2];
    let mut guessing_much = batch();
    guessing_much.rows[1].guesses = vec![0; 33];
    let mut twice = batch();
    twice.rows[1].sequence = 1;
    let results = Body::Results(proto::BatchResults::default());
    let cases = [
        (frame(EPOCH - 1, close()), Code::FailedPrecondition, "a frame of epoch 4 at a worker of epoch 5"),
        (frame(EPOCH + 1, close()), Code::FailedPrecondition, "a frame of epoch 6 at a worker of epoch 5"),
        (frame(EPOCH, Body::Batch(oversized)), Code::InvalidArgument, "a frame carries 2097152 bytes"),
        (frame(EPOCH, Body::Batch(huge)), Code::InvalidArgument, "an activation has shape [2, 4294967295]"),
        (frame(EPOCH, Body::Batch(too_many)), Code::InvalidArgument, "a batch has 701 tokens"),
        (frame(EPOCH, Body::Batch(guessing)), Code::InvalidArgument, "a row has 2 guesses"),
        (frame(EPOCH, Body::Batch(guessing_much)), Code::InvalidArgument, "a row has 33 guesses"),
        (frame(EPOCH, Body::Batch(twice)), Code::InvalidArgument, "a batch has 2 rows, expected at most"),
        (
            frame(EPOCH, results),
            Code::InvalidArgument,
            "what became of a batch does not travel in this direction",
        ),
        (proto::Frame { epoch: EPOCH, body: None }, Code::InvalidArgument, "a frame has no body"),
    ];
    for (frame, code, text) in cases {
        let mut middle = middle(LayerRange::new(2, 4), WorkerOptions::default()).await;
        let (actual, message) = code_of_link(&middle, &middle.previous, vec![frame]).await;
        assert_eq!(actual, code, "{message}");
        assert!(message.starts_with(text), "{message}");
        let ended = middle.member.worker.ended().await;
        assert!(matches!(&ended, Err(Fault::Protocol(reason)) if reason.contains(text)), "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_unopened_sequences_end_the_worker() {
    let mut middle = middle(LayerRange::new(2, 4), WorkerOptions::default()).await;
    let (code, message) =
        code_of_link(&middle, &middle.previous, vec![frame(EPOCH, Body::Batch(batch()))]).await;
    assert_eq!(code, Code::Unavailable);
    assert!(message.contains("a row of sequence 1 which was never opened"), "{message}");
    let ended = middle.member.worker.ended().await;
    assert!(matches!(&ended, Err(Fault::Protocol(reason)) if reason.contains("never opened")), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn everyone_may_do_their_own_part_only() {
    let mut middle = middle(LayerRange::new(0, 2), WorkerOptions::default()).await;
    let worker = &middle.member.worker;
    let address = worker.address().to_string();

    let stranger = Identity::generate().unwrap();
    let expected = ExpectedKey::Pin(worker.key_pin());
    let refused = connect(&address, &stranger, expected, ConnectOptions::default()).await;
    assert!(refused.is_err(), "a stranger gets through TLS");

    for who in [&middle.node, &middle.driver] {
        let mut client = StageClient::new(channel(worker, who).await);
        let status = client.link(futures::stream::pending()).await.expect_err("not a neighbour");
        assert_eq!(status.code(), Code::PermissionDenied);
    }
    for who in [&middle.previous, &middle.node] {
        let refused = DriveClient::connect(&address, worker.key_pin(), who).await;
        assert!(matches!(refused, Err(DriveError::Refused(_))), "{:?}", refused.err());
    }
    for who in [&middle.previous, &middle.driver] {
        let mut client = WorkerClient::new(channel(worker, who).await);
        let stats = client.stats(proto::StatsRequest {}).await.expect_err("not the parent");
        let load = client.load(proto::LoadShardRequest::default()).await.expect_err("not the parent");
        let links = client.set_links(proto::WorkerLinks::default()).await.expect_err("not the parent");
        for status in [stats, load, links] {
            assert_eq!(status.code(), Code::PermissionDenied);
        }
    }

    let mut link = StageClient::new(channel(worker, &middle.previous).await);
    let _first = link.link(futures::stream::pending()).await.unwrap();
    let status = link.link(futures::stream::pending()).await.expect_err("linked already");
    assert_eq!(status.code(), Code::PermissionDenied);
    let again = middle.member.client.set_links(proto::WorkerLinks::default()).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
    assert!(DriveClient::connect(&address, worker.key_pin(), &middle.driver).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_that_never_come_end_the_worker() {
    let options = WorkerOptions { link_deadline: Duration::from_millis(300), ..WorkerOptions::default() };
    let mut middle = middle(LayerRange::new(2, 4), options).await;
    let ended = tokio::time::timeout(Duration::from_secs(5), middle.member.worker.ended()).await;
    let ended = ended.expect("the worker waits for ever");
    assert!(matches!(ended, Err(Fault::NoLink { side: Side::Next | Side::Previous, .. })), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_cannot_be_loaded_says_why() {
    let model = Model::default();
    let whole = LayerRange::new(0, 2);
    let failing: fn() -> StageFactory = || Box::new(|_, _| Err("model.safetensors is truncated".into()));
    let panicking: fn() -> StageFactory = || Box::new(|_, _| panic!("shape mismatch"));
    let wide: fn() -> StageFactory = || Model { hidden: 1 << 20, ..Model::default() }.factory();
    let plain: fn() -> StageFactory = || Model::default().factory();
    let cases = [
        (failing, model.shard(whole, 2), Code::FailedPrecondition, "model.safetensors is truncated"),
        (panicking, model.shard(whole, 2), Code::Internal, "shape mismatch"),
        (wide, model.shard(whole, 2), Code::InvalidArgument, "choose a smaller prefill_chunk"),
        (plain, model.shard(LayerRange::new(1, 1), 2), Code::InvalidArgument, "layers 1..1"),
        (plain, model.shard(LayerRange::new(1, 3), 2), Code::InvalidArgument, "layers 1..3"),
        (
            plain,
            proto::ShardSpec { max_sequences: 0, ..model.shard(whole, 2) },
            Code::InvalidArgument,
            "max_sequences",
        ),
        (
            plain,
            proto::ShardSpec { prefill_chunk: 9000, ..model.shard(whole, 2) },
            Code::InvalidArgument,
            "prefill_chunk",
        ),
    ];
    for (factory, shard, code, text) in cases {
        let node = Identity::generate().unwrap();
        let mut member = Member::start(&node, factory(), WorkerOptions::default()).await;
        let early = member.client.set_links(proto::WorkerLinks::default()).await.unwrap_err();
        assert_eq!(early.code(), Code::FailedPrecondition);
        let status = member.load(shard).await.expect_err(text);
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(text), "{status}");
        member.worker.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn links_must_fit_the_stage() {
    let node = Identity::generate().unwrap();
    let other = || Some(neighbour("127.0.0.1:1", node.key_pin()));
    let bad_pin =
        Some(proto::Neighbour { address: "127.0.0.1:1".into(), key_pin: Bytes::from_static(b"short") });
    let no_address = Some(neighbour("", node.key_pin()));
    let drivers = pins(&node);
    let cases = [
        (
            LayerRange::new(0, 2),
            proto::WorkerLinks { next: other(), previous: other(), drivers: drivers.clone() },
        ),
        (LayerRange::new(0, 2), proto::WorkerLinks { next: None, previous: None, drivers: vec![] }),
        (LayerRange::new(0, 1), proto::WorkerLinks { next: None, previous: None, drivers: drivers.clone() }),
        (
            LayerRange::new(0, 1),
            proto::WorkerLinks { next: other(), previous: None, drivers: drivers.clone() },
        ),
        (LayerRange::new(1, 2), proto::WorkerLinks { next: bad_pin, previous: other(), drivers: vec![] }),
        (LayerRange::new(1, 2), proto::WorkerLinks { next: other(), previous: no_address, drivers: vec![] }),
    ];
    for (layers, links) in cases {
        let mut member = Member::start(&node, Model::default().factory(), WorkerOptions::default()).await;
        member.load(Model::default().shard(layers, 2)).await.unwrap();
        let status = member.client.set_links(links).await.expect_err("links that do not fit");
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
}
