//! Moves messages between the driver, the compute thread, the ring and the scheduler. One task, for as long as the worker lives.
//!
//! It never waits for one of them while another has something: the ring is always drained, or the stages behind it would stop
//! for good. One scheduler at a time: a new one takes over, and what the old one had running is cancelled.

use super::driver::{Driver, Violation};
use crate::error::Fault;
use crate::lifeline::Lifeline;
use crate::link::{Granted, Received};
use crate::message::{DriveEvent, Message};
use crate::wire::{drive_command_from_proto, drive_event_to_proto};
use mlxnode_proto::internal::v1 as proto;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use tracing::{debug, info};

/// Events between this task and the scheduler's connection; what a slow scheduler leaves here and in the driver stops the
/// pipeline.
pub(crate) const SESSION_EVENTS: usize = 64;
/// How long the last events may take to reach the scheduler's connection when the worker ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// A scheduler's stream.
pub(crate) struct Session {
    pub(crate) commands: Streaming<proto::DriveCommand>,
    pub(crate) events: mpsc::Sender<Result<proto::DriveEvent, Status>>,
}

/// Where the last stage's messages come from.
pub(crate) enum Ring {
    /// One stage does all: straight from the compute thread.
    Local(mpsc::Receiver<Message>),
    /// Over the link from the last stage.
    Link(mpsc::Receiver<Received>),
}

impl Ring {
    async fn next(&mut self) -> Option<Message> {
        match self {
            Self::Local(messages) => messages.recv().await,
            Self::Link(received) => received.recv().await.map(|received| received.message),
        }
    }
}

/// Runs until the worker ends. The last act is to tell the scheduler about every sequence that was lost.
pub(crate) async fn run(
    mut driver: Driver,
    work: mpsc::Sender<Received>,
    mut ring: Ring,
    mut sessions: mpsc::Receiver<Session>,
    lifeline: Lifeline,
) {
    let mut session: Option<Session> = None;
    // What the compute thread has no room for yet.
    let mut waiting_work: Option<Message> = None;
    let fault = loop {
        while waiting_work.is_none()
            && let Some(message) = driver.next_work()
        {
            let received = Received { message, credit: Granted::without_link(), arrived: Instant::now() };
            if let Err(mpsc::error::TrySendError::Full(received)) = work.try_send(received) {
                waiting_work = Some(received.message);
            }
        }
        if session.is_none() {
            while driver.next_event().is_some() {} // nobody to tell
        }
        let events = session.as_ref().map(|session| session.events.clone());
        tokio::select! {
            biased;
            () = lifeline.token().cancelled() => break None,
            message = ring.next() => match message {
                None => break Some(Fault::Device("the ring of tokens has ended".into())),
                Some(message) => if let Err(violation) = driver.ring(message) {
                    break Some(Fault::Protocol(format!("the last stage: {violation}")));
                },
            },
            Ok(permit) = work.reserve(), if waiting_work.is_some() => {
                if let Some(message) = waiting_work.take() {
                    let (credit, arrived) = (Granted::without_link(), Instant::now());
                    permit.send(Received { message, credit, arrived });
                }
            },
            room = reserve(events), if driver.has_events() => match room {
                Some(permit) => if let Some(event) = driver.next_event() {
                    permit.send(drive_event_to_proto(&event).map_err(|error| Status::internal(error.to_string())));
                },
                None => leave(&mut driver, &mut session),
            },
            newcomer = sessions.recv() => match newcomer {
                None => break None,
                Some(newcomer) => {
                    if let Some(old) = session.replace(newcomer) {
                        info!("another scheduler takes over");
                        driver.cancel_all();
                        let _ = old.events.try_send(Err(Status::aborted("another scheduler took over")));
                    }
                    driver.welcome();
                }
            },
            command = next_command(&mut session), if session.is_some() && driver.accepts_commands() => {
                match take_command(&mut driver, command) {
                    Ok(true) => {}
                    Ok(false) => leave(&mut driver, &mut session),
                    Err(status) => {
                        if let Some(old) = session.take() {
                            debug!(reason = status.message(), "the scheduler broke the rules");
                            driver.cancel_all();
                            let _ = old.events.try_send(Err(status));
                        }
                    }
                }
            },
        }
    };
    if let Some(fault) = fault {
        lifeline.fail(fault);
    }
    if let Some(session) = session {
        let _ = tokio::time::timeout(FAREWELL, farewell(driver, session, &lifeline.last_words())).await;
    }
}

/// Takes one command. `false`: the scheduler has left.
fn take_command(
    driver: &mut Driver,
    command: Option<Result<proto::DriveCommand, Status>>,
) -> Result<bool, Status> {
    let Some(Ok(command)) = command else { return Ok(false) };
    let command =
        drive_command_from_proto(command).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let taken: Result<(), Violation> = driver.command(command);
    taken.map(|()| true).map_err(|violation| Status::invalid_argument(violation.to_string()))
}

fn leave(driver: &mut Driver, session: &mut Option<Session>) {
    debug!("the scheduler has left");
    driver.cancel_all();
    *session = None;
}

async fn next_command(session: &mut Option<Session>) -> Option<Result<proto::DriveCommand, Status>> {
    match session {
        Some(session) => session.commands.message().await.transpose(),
        None => std::future::pending().await,
    }
}

async fn reserve(
    events: Option<mpsc::Sender<Result<proto::DriveEvent, Status>>>,
) -> Option<mpsc::OwnedPermit<Result<proto::DriveEvent, Status>>> {
    events?.reserve_owned().await.ok()
}

async fn farewell(mut driver: Driver, session: Session, reason: &str) {
    driver.fail_all(reason);
    while let Some(event) = driver.next_event() {
        let event: DriveEvent = event;
        let message = drive_event_to_proto(&event).map_err(|error| Status::internal(error.to_string()));
        if session.events.send(message).await.is_err() {
            return;
        }
    }
    let _ = session.events.send(Err(Status::unavailable(reason.to_owned()))).await;
}
