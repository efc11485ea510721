//! An answer in pieces: server-sent events (WHATWG HTML, 9.2), each its own chunk, with comments while nothing happens.

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::FutureExt as _;
use futures::future::FusedFuture as _;
use serde::Serialize;
use std::time::Duration;
use tokio::sync::mpsc;

/// Proxies and clients give up on a silent connection after some ten seconds or more.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A few events of slack between the model and a slow client; more would only hide that it is slow.
const SLACK: usize = 16;

/// The client is gone.
#[derive(Debug)]
pub(super) struct Gone;

/// Where a producer puts its events.
pub(super) struct Events {
    sender: mpsc::Sender<Bytes>,
}

impl Events {
    /// An event without a name.
    pub(super) async fn data(&self, value: &impl Serialize) -> Result<(), Gone> {
        self.write(b"data: ".to_vec(), value).await
    }

    /// An event with a name.
    pub(super) async fn named(&self, name: &str, value: &impl Serialize) -> Result<(), Gone> {
        self.write(format!("event: {name}\ndata: ").into_bytes(), value).await
    }

    /// The end of a stream in OpenAI's older interfaces.
    pub(super) async fn done(&self) -> Result<(), Gone> {
        self.sender.send(Bytes::from_static(b"data: [DONE]\n\n")).await.map_err(|_| Gone)
    }

    async fn write(&self, mut event: Vec<u8>, value: &impl Serialize) -> Result<(), Gone> {
        // JSON has no raw line breaks, so one line holds it; what we write ourselves can always be written.
        serde_json::to_writer(&mut event, value).map_err(|_| Gone)?;
        event.extend_from_slice(b"\n\n");
        self.sender.send(event.into()).await.map_err(|_| Gone)
    }
}

/// Answers with a producer's events. It runs as a part of the connection's task, so that an event wakes only that; when the client goes away
/// it is dropped, and with it what it holds. While the client does not read, it waits.
pub(super) fn stream<F>(produce: impl FnOnce(Events) -> F) -> Response
where
    F: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(SLACK);
    let producing = Box::pin(produce(Events { sender }).fuse());
    let body = futures::stream::unfold((receiver, producing), |(mut receiver, mut producing)| async move {
        let next = async {
            loop {
                tokio::select! {
                    biased;
                    event = receiver.recv() => return event,
                    // With it went the sender: what it sent is left to read, and then the end.
                    _ = &mut producing, if !producing.is_terminated() => {}
                }
            }
        };
        let event = match tokio::time::timeout(KEEP_ALIVE, next).await {
            Ok(event) => event?,
            Err(_) => Bytes::from_static(b": keep-alive\n\n"),
        };
        Some((Ok::<_, std::convert::Infallible>(event), (receiver, producing)))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
