//! The thread that sends spans.

use crate::service::Client;
use mlxnode_compute::{Span, SpanSink};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

/// Where spans go, and what they say about who sends them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    /// `http://HOST:PORT` of its gRPC listener.
    pub endpoint: String,
    /// Name of the node.
    pub node: String,
    /// "node", or which layers of which model.
    pub part: String,
}

/// Why nothing can be sent.
#[derive(Debug, thiserror::Error)]
pub enum ExporterError {
    /// The text is no endpoint.
    #[error("{0:?} is no collector: name one as http://HOST:PORT (OTLP over gRPC; usually port 4317)")]
    Endpoint(String),
    /// The system has no thread for it.
    #[error("cannot start the thread that sends traces")]
    Thread(#[source] std::io::Error),
}

/// Sends spans until it is dropped; what is left then gets a moment.
#[derive(Debug)]
pub struct Exporter {
    sender: Option<mpsc::Sender<Span>>,
    lost: Arc<AtomicU64>,
    done: std::sync::mpsc::Receiver<()>,
}

/// Spans that wait. A request has some ten of them.
const WAITING: usize = 4096;
/// Spans of one message.
const BATCH: usize = 512;
/// Longest that a span waits for others.
const PERIOD: Duration = Duration::from_secs(1);
/// A collector that takes longer is not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// At the end, for what is left.
const FAREWELL: Duration = Duration::from_secs(2);
/// Between two lines in the log about a collector that is not there.
const SILENCE: Duration = Duration::from_secs(60);

impl Exporter {
    /// Starts the thread. The collector need not be there yet.
    ///
    /// # Errors
    /// [`ExporterError`]
    pub fn start(collector: Collector) -> Result<Self, ExporterError> {
        let client = Client::new(&collector, PATIENCE)
            .map_err(|()| ExporterError::Endpoint(collector.endpoint.clone()))?;
        let (sender, spans) = mpsc::channel(WAITING);
        let (ended, done) = std::sync::mpsc::sync_channel(1);
        let lost = Arc::new(AtomicU64::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ExporterError::Thread)?;
        let counter = lost.clone();
        std::thread::Builder::new()
            .name("traces".into())
            .spawn(move || {
                runtime.block_on(export(client, spans, &counter));
                let _ = ended.send(()); // nobody waits when the process ends otherwise
            })
            .map_err(ExporterError::Thread)?;
        Ok(Self { sender: Some(sender), lost, done })
    }

    /// Where to put spans. Of no effect once the exporter is dropped.
    pub fn sink(&self) -> Arc<dyn SpanSink> {
        // Weak: the thread ends when the exporter goes, and not when the last one who might have a span does.
        let sender = self.sender.as_ref().map(mpsc::Sender::downgrade);
        Arc::new(Sink { sender, lost: self.lost.clone() })
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.sender = None;
        let _ = self.done.recv_timeout(FAREWELL);
    }
}

struct Sink {
    sender: Option<mpsc::WeakSender<Span>>,
    lost: Arc<AtomicU64>,
}

impl fmt::Debug for Sink {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Sink")
    }
}

impl SpanSink for Sink {
    fn take(&self, span: Span) {
        if !span.context.is_sampled() {
            return; // whoever began the trace does not record it
        }
        let sender = self.sender.as_ref().and_then(mpsc::WeakSender::upgrade);
        if sender.is_none_or(|sender| sender.try_send(span).is_err()) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn export(mut client: Client, mut spans: mpsc::Receiver<Span>, lost: &AtomicU64) {
    let mut told: Option<Instant> = None;
    let mut batch = Vec::with_capacity(BATCH);
    while let Some(first) = spans.recv().await {
        batch.push(first);
        let end = Instant::now() + PERIOD;
        while batch.len() < BATCH {
            match tokio::time::timeout_at(end, spans.recv()).await {
                Ok(Some(span)) => batch.push(span),
                // The period is over, or there will be no more.
                Ok(None) | Err(_) => break,
            }
        }
        let count = batch.len();
        let Err(error) = client.send(std::mem::take(&mut batch)).await else {
            debug!(count, "spans sent");
            continue;
        };
        lost.fetch_add(count as u64, Ordering::Relaxed);
        if told.is_none_or(|told| told.elapsed() >= SILENCE) {
            told = Some(Instant::now());
            let lost = lost.load(Ordering::Relaxed);
            warn!(error, lost, "the collector of traces takes nothing");
        }
    }
}
