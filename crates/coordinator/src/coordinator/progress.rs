//! How a load comes along, from the nodes that work on it to the calls that wait for it.
//!
//! Reports do not go through the actor: a download reports many times a second, and only the newest one matters. Each waiting
//! call has a small bounded channel; a report that finds it full is dropped.

use crate::deployments::DeploymentView;
use mlxnode_compute::ByteCount;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// What a load is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading what the model costs.
    Resolving,
    /// Placing it.
    Planning,
    /// Getting it onto the nodes.
    Downloading,
    /// Starting worker processes.
    Starting,
    /// Reading weights.
    Loading,
    /// Connecting the workers.
    Linking,
}

impl Phase {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resolving => "resolving",
            Self::Planning => "planning",
            Self::Downloading => "downloading",
            Self::Starting => "starting",
            Self::Loading => "loading",
            Self::Linking => "linking",
        }
    }
}

/// A report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// On which node; empty for the whole cluster.
    pub node_name: String,
    /// So far.
    pub done: ByteCount,
    /// In all; 0 when unknown.
    pub total: ByteCount,
    /// In words; may be empty.
    pub detail: String,
}

/// What a call that waits for a load hears.
#[derive(Clone, Debug, PartialEq)]
pub enum LoadUpdate {
    /// It comes along. Reports may be missing, but not the last item.
    Progress(Progress),
    /// It is ready: the last item.
    Ready(Box<DeploymentView>),
}

/// Reports that may wait for a slow caller.
pub(super) const REPORTS: usize = 32;

/// All calls that wait, by the deployment they wait for.
#[derive(Debug, Default)]
pub(super) struct Audience {
    listeners: Mutex<HashMap<String, Vec<mpsc::Sender<Progress>>>>,
}

impl Audience {
    pub(super) fn join(&self, name: &str) -> mpsc::Receiver<Progress> {
        let (sender, receiver) = mpsc::channel(REPORTS);
        self.listeners().entry(name.to_owned()).or_default().push(sender);
        receiver
    }

    pub(super) fn tell(&self, name: &str, progress: &Progress) {
        let mut listeners = self.listeners();
        let Some(all) = listeners.get_mut(name) else { return };
        all.retain(|listener| {
            !matches!(listener.try_send(progress.clone()), Err(mpsc::error::TrySendError::Closed(_)))
        });
        if all.is_empty() {
            listeners.remove(name);
        }
    }

    /// Forgets the listeners of this deployment that went away.
    pub(super) fn leave(&self, name: &str) {
        let mut listeners = self.listeners();
        if let Some(all) = listeners.get_mut(name) {
            all.retain(|listener| !listener.is_closed());
            if all.is_empty() {
                listeners.remove(name);
            }
        }
    }

    fn listeners(&self) -> MutexGuard<'_, HashMap<String, Vec<mpsc::Sender<Progress>>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a node's order reports its progress. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ProgressSink {
    audience: Arc<Audience>,
    deployment: String,
    phase: Phase,
    node_name: String,
    last_change: Arc<Mutex<Change>>,
}

#[derive(Debug)]
struct Change {
    at: Instant,
    done: ByteCount,
}

impl ProgressSink {
    pub(super) fn new(audience: Arc<Audience>, deployment: &str, phase: Phase, node_name: String) -> Self {
        let last_change = Arc::new(Mutex::new(Change { at: Instant::now(), done: ByteCount(0) }));
        Self { audience, deployment: deployment.to_owned(), phase, node_name, last_change }
    }

    /// So much of so much is done (`total` 0: unknown). An order whose `done` stands still for too long is given up.
    pub fn report(&self, done: ByteCount, total: ByteCount) {
        {
            let mut last = self.last_change.lock().unwrap_or_else(PoisonError::into_inner);
            if last.done != done {
                *last = Change { at: Instant::now(), done };
            }
        }
        let (phase, node_name) = (self.phase, self.node_name.clone());
        let detail = String::new();
        self.audience.tell(&self.deployment, &Progress { phase, node_name, done, total, detail });
    }

    /// Completes when nothing has moved for so long.
    pub(super) async fn stands_still(&self, for_long: Duration) {
        loop {
            let limit = self.last_change.lock().unwrap_or_else(PoisonError::into_inner).at + for_long;
            if limit <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(limit).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(done: u64) -> Progress {
        let (done, total) = (ByteCount(done), ByteCount(0));
        Progress { phase: Phase::Loading, node_name: "mac".into(), done, total, detail: String::new() }
    }

    #[test]
    fn a_slow_listener_misses_reports_and_one_that_left_is_forgotten() {
        let audience = Audience::default();
        let mut slow = audience.join("a");
        let mut gone = audience.join("a");
        for number in 0..100 {
            audience.tell("a", &report(number));
        }
        gone.close();
        audience.leave("a");
        assert_eq!(audience.listeners()["a"].len(), 1);
        let heard = std::iter::from_fn(|| slow.try_recv().ok()).count();
        assert_eq!(heard, REPORTS);
        slow.close();
        audience.leave("a");
        audience.leave("never heard of");
        assert!(audience.listeners().is_empty(), "nothing is kept for those who left");
    }

    #[tokio::test]
    async fn only_a_change_is_movement() {
        let sink = ProgressSink::new(Arc::new(Audience::default()), "a", Phase::Loading, String::new());
        let limit = Duration::from_millis(40);
        let started = Instant::now();
        sink.report(ByteCount(0), ByteCount(0));
        sink.stands_still(limit).await;
        assert!(started.elapsed() >= limit);
        sink.report(ByteCount(1), ByteCount(0));
        let moved = Instant::now();
        sink.stands_still(limit).await;
        assert!(moved.elapsed() >= limit / 2, "the report began a new period");
    }
}
