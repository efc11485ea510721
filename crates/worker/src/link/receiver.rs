//! The receiving end of a link: checks frames, makes messages, hands them on with their credits.

use super::{Assembler, CreditLedger, FrameError, Granted, LinkPlan};
use crate::error::{Fault, Side};
use crate::message::Message;
use mlxnode_proto::internal::v1::{Credit, Frame};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

/// A message and the credit that comes free when it is worked on.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) message: Message,
    pub(crate) credit: Granted,
    pub(crate) arrived: Instant,
}

/// Reads the link until it ends, which is always a fault: it lives as long as the replica. A frame that does not fit is answered
/// with a status before the stream ends.
pub(crate) async fn receive(
    mut frames: impl Stream<Item = Result<Frame, Status>> + Unpin,
    plan: LinkPlan,
    ledger: Arc<CreditLedger>,
    replies: mpsc::Sender<Result<Credit, Status>>,
    inbox: mpsc::Sender<Received>,
) -> Fault {
    let mut assembler = Assembler::new(plan);
    // The credits of an activation's first frames: they come free with its last one, so that its memory is counted.
    let mut earlier: Option<Granted> = None;
    loop {
        let frame = match frames.next().await {
            Some(Ok(frame)) => frame,
            Some(Err(status)) => return Fault::LinkLost(Side::Previous, status.message().to_owned()),
            None => return Fault::LinkLost(Side::Previous, "it closed the stream".into()),
        };
        let strike = match ledger.charge() {
            None => Status::resource_exhausted("a frame came for which no credit was granted"),
            Some(mut credit) => match assembler.accept(frame) {
                Ok(None) => {
                    if let Some(earlier) = earlier.take() {
                        credit.absorb(earlier);
                    }
                    earlier = Some(credit);
                    continue;
                }
                Ok(Some(message)) => {
                    if let Some(earlier) = earlier.take() {
                        credit.absorb(earlier);
                    }
                    match inbox.send(Received { message, credit, arrived: Instant::now() }).await {
                        Ok(()) => continue,
                        Err(_) => return Fault::Device("the compute thread has ended".into()),
                    }
                }
                Err(error @ FrameError::Epoch { .. }) => Status::failed_precondition(error.to_string()),
                Err(error) => Status::invalid_argument(error.to_string()),
            },
        };
        let fault = Fault::Protocol(format!("the previous stage: {}", strike.message()));
        let _ = replies.send(Err(strike)).await; // the stream may have ended meanwhile
        return fault;
    }
}
