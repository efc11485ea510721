//! `/v1/files` and `/v1/fine_tuning/jobs` as far as they need no coordinator: uploads of every shape, and what is refused. The whole way
//! is in tests/http_openai.rs.

use crate::client::{Reply, ask, get, post, raw};
use crate::desk::Desk;
use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use mlxnode_api::http::HttpOptions;
use mlxnode_api::jobs::{
    ContentHash, DownloadPart, Examined, FilePiece, InputFile, JobFiles, JobsService, NamedFile, Received,
    Receiving, TakingIn, Unfit,
};
use mlxnode_api::{CoordinatorRoute, Route};
use mlxnode_cluster::NodeId;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::Checkpoint;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tonic::Status;

/// No coordinator: what gets that far is answered 503.
struct Nowhere;

impl CoordinatorRoute for Nowhere {
    fn route(&self) -> Result<Route, Status> {
        Err(Status::unavailable("the coordinator is not there"))
    }
}

/// Files in memory.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    contents: Vec<Bytes>,
    named: Vec<NamedFile>,
    coming: usize,
}

struct Coming {
    memory: Memory,
    bytes: Vec<u8>,
}

impl Memory {
    fn held<T>(&self, look: impl FnOnce(&mut Held) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.memory.held(|held| held.coming -= 1);
    }
}

impl TakingIn for Coming {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), Error>> {
        self.bytes.extend_from_slice(&data);
        async { Ok(()) }.boxed()
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, Result<(ContentHash, u64), Error>> {
        let content = Bytes::from(std::mem::take(&mut self.bytes));
        let (hash, bytes) = (ContentHash::of(&content), content.len() as u64);
        self.memory.held(|held| held.contents.push(content));
        async move { Ok((hash, bytes)) }.boxed()
    }
}

fn none<T: Send + 'static>() -> BoxFuture<'static, Result<T, Error>> {
    async { Err(Error::Unavailable("not here".into())) }.boxed()
}

impl JobFiles for Memory {
    fn received(&self, _: ContentHash) -> BoxFuture<'static, Result<Received, Error>> {
        none()
    }

    fn receive(
        &self,
        _: ContentHash,
        _: u64,
        _: u64,
    ) -> BoxFuture<'static, Result<Box<dyn Receiving>, Error>> {
        none()
    }

    fn take_in(&self) -> BoxFuture<'static, Result<Box<dyn TakingIn>, Error>> {
        self.held(|held| held.coming += 1);
        let coming = Coming { memory: self.clone(), bytes: Vec::new() };
        async move { Ok(Box::new(coming) as Box<dyn TakingIn>) }.boxed()
    }

    fn keep(&self, file: NamedFile) -> BoxFuture<'static, Result<(), Error>> {
        self.held(|held| held.named.push(file));
        async { Ok(()) }.boxed()
    }

    fn kept(&self) -> BoxFuture<'static, Result<Vec<NamedFile>, Error>> {
        let kept = self.held(|held| held.named.clone());
        async { Ok(kept) }.boxed()
    }

    fn forget(&self, id: String) -> BoxFuture<'static, Result<(), Error>> {
        self.held(|held| held.named.retain(|file| file.id != id));
        async { Ok(()) }.boxed()
    }

    fn content(&self, file: InputFile) -> BoxStream<'static, Result<Bytes, Error>> {
        let found =
            self.held(|held| held.contents.iter().find(|it| ContentHash::of(it) == file.hash).cloned());
        futures::stream::iter(found.into_iter().map(Ok)).boxed()
    }

    /// Three rows, whatever they are.
    fn check(&self, _: String, _: String, _: Vec<InputFile>) -> BoxFuture<'static, Result<Examined, Unfit>> {
        async { Ok(Examined { rows: 3, ..Examined::default() }) }.boxed()
    }

    fn has_length(&self, _: ContentHash, _: u64) -> BoxFuture<'static, Option<bool>> {
        async { None }.boxed()
    }

    fn missing(&self, hashes: Vec<ContentHash>) -> BoxFuture<'static, Vec<ContentHash>> {
        async { hashes }.boxed()
    }

    fn download(
        &self,
        _: String,
        _: Checkpoint,
        _: DownloadPart,
    ) -> BoxStream<'static, Result<FilePiece, Error>> {
        futures::stream::empty().boxed()
    }

    fn node_name(&self, node: NodeId) -> String {
        node.short()
    }
}

async fn desk(memory: &Memory) -> Result<Desk> {
    let service = JobsService::new(Arc::new(Nowhere), Arc::new(memory.clone()));
    Desk::with_service(HttpOptions::local(), service).await
}

const FORM: &str = "content-type: multipart/form-data; boundary=XX\r\n";

fn part(head: &str, text: &str) -> String {
    format!("--XX\r\ncontent-disposition: form-data; {head}\r\n\r\n{text}\r\n")
}

fn purpose() -> String {
    part("name=\"purpose\"", "fine-tune")
}

fn rows(text: &str) -> String {
    part("name=\"file\"; filename=\"rows.jsonl\"", text)
}

async fn upload(address: SocketAddr, headers: &str, body: &str) -> Result<Reply> {
    ask(address, "POST", "/v1/files", headers, body).await
}

fn refused(reply: &Reply, status: u16, words: &str) -> Result<()> {
    let body = reply.json()?;
    let message = body["error"]["message"].as_str().with_context(|| format!("{reply:?}"))?;
    ensure!(reply.status == status && message.contains(words), "not {status} {words:?}: {reply:?}");
    Ok(())
}

#[tokio::test]
async fn a_file_comes_whole_or_leaves_nothing() -> Result<()> {
    let memory = Memory::default();
    let desk = desk(&memory).await?;
    let large = "x".repeat(1 << 20);
    for (first, second) in [(purpose(), rows(&large)), (rows(&large), purpose())] {
        let reply = upload(desk.address, FORM, &format!("{first}{second}--XX--\r\n")).await?;
        ensure!(reply.status == 200, "{reply:?}");
        let file = reply.json()?;
        ensure!((&file["bytes"], &file["filename"]) == (&json!(1 << 20), &json!("rows.jsonl")), "{file}");
        let id = file["id"].as_str().context("id")?;
        let content = get(desk.address, &format!("/v1/files/{id}/content")).await?;
        ensure!(content.body == large, "{} bytes", content.body.len());
    }
    let listed = get(desk.address, "/v1/files").await?.json()?;
    ensure!(listed["data"].as_array().is_some_and(|files| files.len() == 2), "{listed}");
    let end = "--XX--\r\n";
    for (headers, body, status, words) in [
        ("", String::new(), 400, "multipart/form-data"),
        ("content-type: application/json\r\n", "{}".into(), 400, "multipart/form-data"),
        ("content-type: multipart/form-data\r\n", "{}".into(), 400, "multipart/form-data"),
        (FORM, String::new(), 400, "cannot be read"),
        (FORM, "nonsense".into(), 400, "cannot be read"),
        (FORM, end.into(), 400, "purpose is missing"),
        (FORM, purpose() + end, 400, "file is missing"),
        (FORM, rows("x") + end, 400, "purpose is missing"),
        (FORM, part("name=\"purpose\"", "vision") + &rows("x") + end, 400, "only \"fine-tune\""),
        (FORM, part("name=\"purpose\"", &large) + end, 400, "longer than"),
        (FORM, purpose() + &purpose() + end, 400, "twice"),
        (FORM, purpose() + &rows("x") + &rows("y") + end, 400, "twice"),
        (FORM, purpose() + &part("name=\"file\"", "x") + end, 400, "no filename"),
        (FORM, purpose() + &rows("x") + &part("name=\"typo\"", "x") + end, 400, "\"typo\""),
        (FORM, purpose() + &part("name=\"expires_after[seconds]\"", "9") + end, 400, "not supported"),
        // Broken off, in a head and in a file.
        (FORM, purpose() + "--XX\r\ncontent-disposition: form-data; name=\"file\"", 400, "cannot be read"),
        (FORM, purpose() + rows(&large).trim_end(), 400, "cannot be read"),
        (FORM, format!("--XX\r\nx: {}", "x".repeat(9 << 20)), 400, "cannot be read"),
    ] {
        refused(&upload(desk.address, headers, &body).await?, status, words)?;
    }
    // The client leaves in the middle.
    let head = format!("POST /v1/files HTTP/1.1\r\nhost: localhost\r\n{FORM}content-length: 999999\r\n\r\n");
    let mut stream = tokio::net::TcpStream::connect(desk.address).await?;
    use tokio::io::AsyncWriteExt as _;
    stream.write_all((head + &purpose() + &rows("begun")).as_bytes()).await?;
    drop(stream);
    let until = Instant::now() + Duration::from_secs(10);
    while memory.held(|held| held.coming) > 0 {
        ensure!(Instant::now() < until, "something is left of an upload");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    ensure!(memory.held(|held| held.contents.len()) == 2, "only whole files stay");
    desk.stop().await
}

/// Refusals come at once; a busy machine gets a few more tries.
async fn soon(address: SocketAddr, method: &str, path: &str, body: &str) -> Result<Reply> {
    let mut took = Duration::MAX;
    for _ in 0..8 {
        let started = Instant::now();
        let reply = ask(address, method, path, "content-type: application/json\r\n", body).await?;
        took = took.min(started.elapsed());
        if took <= Duration::from_millis(50) {
            return Ok(reply);
        }
    }
    anyhow::bail!("{method} {path} took {took:?}")
}

#[tokio::test]
async fn what_is_wrong_is_answered_at_once_by_a_typed_error() -> Result<()> {
    let memory = Memory::default();
    let desk = desk(&memory).await?;
    let file = upload(desk.address, FORM, &(purpose() + &rows("{}\n") + "--XX--\r\n")).await?.json()?;
    let id = file["id"].as_str().context("id")?;
    let far = "x".repeat(300);
    for (method, path, status) in [
        ("GET", "/v1/files?typo=1", 400),
        ("GET", "/v1/files?limit=0", 400),
        ("GET", "/v1/files?limit=-1", 400),
        ("GET", "/v1/files?limit=1&limit=2", 400),
        ("GET", "/v1/files?order=up", 400),
        ("GET", "/v1/files?purpose=vision", 400),
        ("GET", "/v1/files?after=file-x", 400),
        ("GET", "/v1/files/file-x", 404),
        ("GET", "/v1/files/..%2F..%2Fetc", 404),
        ("GET", "/v1/files/%ff", 400),
        ("GET", &format!("/v1/files/{far}"), 404),
        ("GET", "/v1/files/file-x/content", 404),
        ("DELETE", "/v1/files/file-x", 404),
        ("DELETE", "/v1/files", 405),
        ("PUT", "/v1/files", 405),
        ("POST", "/v1/files/file-x", 405),
        ("GET", "/v1/fine_tuning/jobs?limit=101", 400),
        ("GET", "/v1/fine_tuning/jobs?metadata[a]=b", 400),
        ("GET", "/v1/fine_tuning/jobs/x/events?limit=x", 400),
        ("GET", "/v1/fine_tuning/jobs/x/checkpoints?order=asc", 400),
        ("GET", "/v1/fine_tuning/jobs/%ff", 400),
        ("GET", "/v1/fine_tuning/jobs/x/other", 404),
        ("GET", "/v1/fine_tuning/jobs/x/cancel", 405),
        ("DELETE", "/v1/fine_tuning/jobs/x", 405),
        // What is right gets as far as the coordinator, which is not there.
        ("GET", "/v1/fine_tuning/jobs", 503),
        ("GET", "/v1/fine_tuning/jobs/x", 503),
        ("POST", "/v1/fine_tuning/jobs/x/cancel", 503),
    ] {
        refused(&soon(desk.address, method, path, "").await?, status, "")?;
    }
    let body = |more: Value| {
        let mut body = json!({"model": "demo", "training_file": id});
        for (name, value) in more.as_object().into_iter().flatten() {
            body[name] = value.clone();
        }
        body.to_string()
    };
    for (more, param) in [
        (json!({"model": null}), "model"),
        (json!({"model": 7}), "model"),
        (json!({"model": "demo:style"}), "model"),
        (json!({"training_file": null}), "training_file"),
        (json!({"training_file": "file-x"}), "training_file"),
        (json!({"validation_file": far}), "validation_file"),
        (json!({"suffix": "style"}), "suffix"),
        (json!({"suffix": "a:b"}), "suffix"),
        (json!({"suffix": far}), "suffix"),
        (json!({"hyperparameters": []}), "hyperparameters"),
        (json!({"hyperparameters": {"n_epochs": "3"}}), "hyperparameters.n_epochs"),
        (json!({"hyperparameters": {"batch_size": 1025}}), "hyperparameters.batch_size"),
        (json!({"hyperparameters": {"batch_size": 4}}), "batch_size"),
        (json!({"hyperparameters": {"typo": 4}}), "hyperparameters.typo"),
        (
            json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}),
            "method.dpo.hyperparameters.beta",
        ),
        (json!({"method": "dpo"}), "method"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"metadata": {"a": null}}), "metadata"),
        (json!({"workers": 0}), "workers"),
        (json!({"stages": 9}), "stages"),
        (json!({"stages": 2, "workers": 3}), "stages"),
        (json!({"share_percent": 101}), "share_percent"),
        (json!({"configuration": 7}), "configuration"),
    ] {
        let reply = soon(desk.address, "POST", "/v1/fine_tuning/jobs", &body(more.clone())).await?;
        refused(&reply, 400, "").with_context(|| more.to_string())?;
        ensure!(reply.json()?["error"]["param"] == param, "{more}: {reply:?}");
    }
    for wrong in ["", "[]", "{", "7", "{\"model\": \"demo\""] {
        refused(&soon(desk.address, "POST", "/v1/fine_tuning/jobs", wrong).await?, 400, "")?;
    }
    let key = format!("idempotency-key: {}\r\n", "x".repeat(256));
    let reply = ask(desk.address, "POST", "/v1/fine_tuning/jobs", &key, &body(json!({}))).await?;
    ensure!(reply.json()?["error"]["param"] == "Idempotency-Key", "{reply:?}");
    refused(
        &post(desk.address, "/v1/fine_tuning/jobs", &serde_json::from_str(&body(json!({})))?).await?,
        503,
        "",
    )?;
    refused(&raw(desk.address, b"POST /v1/files HTTP/1.0\r\nhost: localhost\r\n\r\n").await?, 400, "")?;
    desk.stop().await
}
