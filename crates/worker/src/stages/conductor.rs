//! The node's side of a line: brings the stages together and hears when one is lost.

use crate::collective::GroupPeer;
use crate::error::shortened;
use mlxnode_cluster::{ConnectOptions, ExpectedKey, Identity, connect};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::line_report::Report;
use mlxnode_proto::internal::v1::stage_line_client::StageLineClient;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::Streaming;

/// For the connection and the answer to the call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The process of one stage, for whoever brings the line together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineWorker {
    /// As the leading node reaches it.
    pub control: SocketAddr,
    /// As the other stages reach it.
    pub peer: GroupPeer,
}

/// A stage that is not there, or no more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stage {stage}: {reason}")]
pub struct LineError {
    /// Which one said so first.
    pub stage: usize,
    /// Why, for people.
    pub reason: String,
}

/// A line that is formed. Dropping it ends it for all stages.
#[derive(Debug)]
pub struct Line {
    ends: mpsc::Receiver<LineError>,
    _orders: Vec<mpsc::Sender<proto::LineFormation>>,
    _readers: Vec<AbortOnDropHandle<()>>,
}

impl Line {
    /// Tells the processes of all stages, in order, where the others are, and waits until all lanes are open. `identity` is what they were
    /// started to obey.
    ///
    /// # Errors
    /// [`LineError`] when one of them is not there within `within`.
    pub async fn form(
        workers: &[LineWorker],
        identity: &Identity,
        within: Duration,
    ) -> Result<Self, LineError> {
        let forming = async {
            let connecting =
                workers.iter().enumerate().map(|(stage, worker)| control(stage, worker, identity));
            let mut controls = futures::future::try_join_all(connecting).await?;
            let stage = |worker: &LineWorker| proto::LineStage {
                address: worker.peer.address.clone(),
                key_pin: worker.peer.key_pin.as_bytes().to_vec().into(),
            };
            let formation = proto::LineFormation { stages: workers.iter().map(stage).collect() };
            for (orders, _) in &controls {
                // There is room for the only one; a stage that has ended says so.
                let _ = orders.try_send(formation.clone());
            }
            let formed = controls.iter_mut().enumerate().map(|(stage, (_, reports))| async move {
                match next(stage, reports).await {
                    None => Ok(()),
                    Some(error) => Err(error),
                }
            });
            futures::future::try_join_all(formed).await?;
            Ok(controls)
        };
        let late = |_| LineError {
            stage: 0,
            reason: format!("the stages did not come together within {} s", within.as_secs()),
        };
        let controls: Vec<_> = timeout(within, forming).await.map_err(late)??;
        let (told, ends) = mpsc::channel(workers.len().max(1));
        let mut line = Self { ends, _orders: Vec::new(), _readers: Vec::new() };
        for (stage, (orders, mut reports)) in controls.into_iter().enumerate() {
            let told = told.clone();
            line._orders.push(orders);
            line._readers.push(AbortOnDropHandle::new(tokio::spawn(async move {
                loop {
                    if let Some(end) = next(stage, &mut reports).await {
                        // Room for the end of each.
                        let _ = told.try_send(end);
                        return;
                    }
                }
            })));
        }
        Ok(line)
    }

    /// Waits until the line is over: which stage said so first, and why.
    pub async fn over(&mut self) -> LineError {
        let end = self.ends.recv().await;
        end.unwrap_or_else(|| LineError { stage: 0, reason: "nobody is left".to_owned() })
    }
}

type Control = (mpsc::Sender<proto::LineFormation>, Streaming<proto::LineReport>);

async fn control(stage: usize, worker: &LineWorker, identity: &Identity) -> Result<Control, LineError> {
    let failed = |reason: String| LineError { stage, reason };
    let options = ConnectOptions { timeout: CALL_TIMEOUT, ..ConnectOptions::default() };
    let expected = ExpectedKey::Pin(worker.peer.key_pin);
    let channel = connect(&worker.control.to_string(), identity, expected, options).await;
    let channel = channel.map_err(|error| failed(error.to_string()))?;
    let (orders, stream) = mpsc::channel(1);
    let mut client = StageLineClient::new(channel);
    let answer = timeout(CALL_TIMEOUT, client.control(ReceiverStream::new(stream))).await;
    let answer = answer.map_err(|_| failed("it does not answer".to_owned()))?;
    let answer = answer.map_err(|status| failed(shortened(status.message())))?;
    Ok((orders, answer.into_inner()))
}

/// The next report: `None` when all its lanes are open, otherwise why the line is over.
async fn next(stage: usize, reports: &mut Streaming<proto::LineReport>) -> Option<LineError> {
    let reason = match reports.message().await {
        Ok(Some(proto::LineReport { report: Some(Report::Formed(_)) })) => return None,
        Ok(Some(proto::LineReport { report: Some(Report::Over(why)) })) => shortened(&why),
        Ok(Some(proto::LineReport { report: None })) => "it says nothing".to_owned(),
        Ok(None) => "it has ended".to_owned(),
        Err(status) => shortened(status.message()),
    };
    Some(LineError { stage, reason })
}
