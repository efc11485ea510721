//! The task that keeps the link to one peer: dial, beat, exchange rosters, and dial again.

use super::{Report, Shared};
use crate::discovery::Candidate;
use crate::pin::NodeId;
use crate::tls::ExpectedKey;
use crate::transport::{ConnectError, ConnectOptions, dial};
use crate::wire;
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt, OptionFuture};
use mlxnode_proto::PROTOCOL_VERSION;
use mlxnode_proto::internal::v1 as proto;
use proto::peer_client::PeerClient;
use std::collections::VecDeque;
use std::error::Error;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{debug, warn};

/// How long one dial may take.
const DIAL_TIME: Duration = Duration::from_millis(1500);
/// Pause after the first failed dial; doubled up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long handing a roster over may take.
const ROSTER_TIME: Duration = Duration::from_secs(2);
/// How long a removed peer gets to hear of it.
const FAREWELL: Duration = Duration::from_millis(500);
/// Sent beats of which the time is remembered: their answers are late by seconds then.
const REMEMBERED: usize = 16;

/// Keeps the link until `removed`.
pub(super) async fn keep(shared: Arc<Shared>, peer: NodeId, wake: Arc<Notify>, removed: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    loop {
        let end = CancellationToken::new();
        let opened = tokio::select! {
            opened = open(&shared, peer, &end) => opened,
            () = removed.cancelled() => break,
        };
        match opened {
            Ok((channel, address)) => {
                debug!(peer = %peer.short(), %address, "link up");
                shared.channels.write().unwrap_or_else(PoisonError::into_inner).insert(peer, channel.clone());
                let _ = shared.reports.send(Report::LinkUp { peer, address }).await;
                let mut link = Link { shared: &shared, peer, client: client(channel.clone()), heard: None };
                let lost = tokio::select! {
                    lost = link.run() => Some(lost),
                    () = removed.cancelled() => None,
                };
                let was_good = link.heard.is_some();
                shared.channels.write().unwrap_or_else(PoisonError::into_inner).remove(&peer);
                let Some(problem) = lost else {
                    farewell(&shared, channel).await;
                    end.cancel();
                    break;
                };
                end.cancel();
                debug!(peer = %peer.short(), %problem, "link lost");
                let _ = shared.reports.send(Report::LinkLost { peer, problem }).await;
                if was_good {
                    pause = FIRST_PAUSE;
                    continue; // dial again at once: whether that works tells if the peer is gone
                }
            }
            Err(Failure { refused, problem }) => {
                let _ = shared.reports.send(Report::DialFailed { peer, refused, problem }).await;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            () = wake.notified() => {}
            () = removed.cancelled() => break,
        }
    }
    shared.book.forget(&peer);
}

fn client(channel: Channel) -> PeerClient<Channel> {
    PeerClient::new(channel).max_decoding_message_size(crate::peer_service::MAX_MESSAGE)
}

struct Failure {
    /// Nothing listens where the peer was, or at none of its addresses.
    refused: bool,
    problem: String,
}

/// Dials the peer at all its addresses, several at a time, and takes the first that answers with its key.
async fn open(shared: &Shared, peer: NodeId, end: &CancellationToken) -> Result<(Channel, String), Failure> {
    let listed = shared.roster.current();
    let listed = listed.as_ref().and_then(|signed| signed.roster().get(&peer));
    let listed = listed.map_or(&[][..], |entry| entry.addresses.as_slice());
    let candidates = shared.discovery.candidates();
    let hints: Vec<String> =
        candidates.borrow().iter().flat_map(|candidate: &Candidate| candidate.addresses.clone()).collect();
    let targets = shared.book.targets(&peer, listed, &hints);
    let last_proven = shared.book.last_proven(&peer);

    let dials = targets.into_iter().map(|address| async move {
        // Closed only when the mesh is gone, and then nobody waits here.
        let _permit = shared.dials.acquire().await;
        let options = ConnectOptions { timeout: DIAL_TIME, end: end.clone() };
        let outcome = dial(&address, &shared.identity, ExpectedKey::Pin(peer.pin()), options).await;
        (address, outcome)
    });
    let mut dials = futures::stream::iter(dials).buffer_unordered(super::DIALS);
    let (mut all_refused, mut refused_where_it_was) = (true, false);
    let mut problem = None;
    while let Some((address, outcome)) = dials.next().await {
        let error = match outcome {
            Ok(link) => {
                shared.book.proven(peer, &address);
                shared.book.answered(&address, link.pin);
                return Ok((link.channel, address));
            }
            Err(error) => error,
        };
        if let ConnectError::WrongKey { address, found } = &error {
            shared.book.answered(address, *found);
            continue; // somebody else's address says nothing about the peer
        }
        all_refused &= error.is_refused();
        refused_where_it_was |= error.is_refused() && last_proven.as_ref() == Some(&address);
        problem = Some(match error.source() {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        });
    }
    let refused = problem.is_some() && (all_refused || refused_where_it_was);
    let problem = problem
        .unwrap_or_else(|| "no address of it is known: say where it is with `--peer HOST:PORT`".into());
    Err(Failure { refused, problem })
}

/// An open link.
struct Link<'a> {
    shared: &'a Arc<Shared>,
    peer: NodeId,
    client: PeerClient<Channel>,
    /// When the peer's last beat came.
    heard: Option<Instant>,
}

impl Link<'_> {
    /// Beats until the link is lost, and answers why it was.
    async fn run(&mut self) -> String {
        let timing = self.shared.timing;
        let (beats, outgoing) = mpsc::channel(2);
        let mut sent = VecDeque::with_capacity(REMEMBERED);
        let mut sequence = 1;
        sent.push_back((sequence, Instant::now()));
        let _ = beats.try_send(self.shared.beat(sequence, 0));
        let opened = self.client.heartbeat(ReceiverStream::new(outgoing));
        let mut answers = match tokio::time::timeout(timing.dead_after, opened).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return status.message().to_owned(),
            Err(_) => return "it does not answer beats".to_owned(),
        };
        let opened_at = Instant::now();
        let mut newest_answer = 0;
        let mut period = tokio::time::interval(timing.period);
        period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut roster = self.shared.roster.watch();
        let mut exchange: Option<BoxFuture<'static, ()>> = None;
        let mut peers_version = 0;
        loop {
            tokio::select! {
                _ = period.tick() => {
                    if self.heard.unwrap_or(opened_at).elapsed() >= timing.dead_after {
                        return "it is silent".to_owned();
                    }
                    sequence += 1;
                    if sent.len() == REMEMBERED {
                        sent.pop_front();
                    }
                    sent.push_back((sequence, Instant::now()));
                    // Full when the peer does not read: then it is silent too, see above.
                    let _ = beats.try_send(self.shared.beat(sequence, newest_answer));
                }
                answer = answers.message() => {
                    let beat = match answer {
                        Ok(Some(beat)) => beat,
                        Ok(None) => return "it ended the link".to_owned(),
                        Err(status) => return status.message().to_owned(),
                    };
                    if beat.protocol_version != PROTOCOL_VERSION {
                        return crate::peer_service::versions_differ(beat.protocol_version);
                    }
                    self.heard = Some(Instant::now());
                    newest_answer = beat.sequence;
                    peers_version = beat.roster_version;
                    let echo = sent.iter().find(|(number, _)| *number == beat.echo_sequence);
                    let held = Duration::from_micros(beat.echo_age_micros);
                    let rtt = echo.map(|(_, at)| at.elapsed().saturating_sub(held));
                    let _ = self.shared.reports.send(Report::beat(self.peer, beat, rtt)).await;
                }
                Ok(()) = roster.changed() => {}
                Some(()) = OptionFuture::from(exchange.as_mut()) => exchange = None,
            }
            if exchange.is_none() && peers_version > 0 && peers_version != self.shared.roster.version() {
                let ours = self.shared.roster.version();
                let talk = exchange_rosters(self.shared.clone(), self.client.clone(), peers_version > ours);
                exchange = Some(talk.boxed());
                peers_version = 0; // the next beat says how it went
            }
        }
    }
}

/// Fetches the peer's newer roster, or hands over ours.
async fn exchange_rosters(shared: Arc<Shared>, mut client: PeerClient<Channel>, fetch: bool) {
    let talk = async {
        if fetch {
            let offered = client.get_roster(proto::GetRosterRequest {}).await?.into_inner();
            // Checking and keeping a roster waits for the disk.
            let taken = tokio::task::spawn_blocking(move || shared.roster.offer(&offered)).await;
            match taken {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => warn!(%error, "a peer's roster was not taken"),
                Err(error) => warn!(%error, "a peer's roster was not looked at"),
            }
        } else if let Some(signed) = shared.roster.current() {
            client.put_roster(wire::signed_roster_to_wire(&signed)).await?;
        }
        Ok::<_, tonic::Status>(())
    };
    match tokio::time::timeout(ROSTER_TIME, talk).await {
        Ok(Ok(())) => {}
        Ok(Err(status)) => debug!(status = status.message(), "rosters were not exchanged"),
        Err(_) => debug!("a peer took too long to exchange rosters"),
    }
}

/// Tells a peer that it was taken out of the roster: nobody else will talk to it any more.
async fn farewell(shared: &Shared, channel: Channel) {
    if let Some(signed) = shared.roster.current() {
        let roster = wire::signed_roster_to_wire(&signed);
        let _ = tokio::time::timeout(FAREWELL, client(channel).put_roster(roster)).await;
    }
}
