//! How long a sequence that lost its replica waits for another one, and when it asks again. Plain: what is seen and `now` in, a verdict
//! out.
//!
//! While a replica is being formed, waiting makes sense, for as long as reading a large model from a disk takes. While nobody forms one
//! (its node is gone, or it says that it is ready and does not answer), only a node that comes back helps, and that is
//! worth less time. A model that was unloaded does not come back.

use crate::deployments::{DeploymentView, State};
use mlxnode_compute::ByteCount;
use std::time::{Duration, Instant};

/// How long a sequence waits at most while nobody forms a replica: a node that crashed and is started again is back by then.
pub const DEFAULT_RESUME_WITHIN: Duration = Duration::from_secs(30);

/// Replicas that a sequence may lose in a row without a token in between. A request that breaks workers must not break all of them.
/// (Dynamo's number of migrations.)
pub(super) const MAX_FRUITLESS: usize = 3;
/// While a replica is being formed: at the least, and what its weights take at the speed of a slow disk.
const FORMING: Duration = Duration::from_secs(120);
const SLOW_DISK_BYTES_PER_SECOND: u64 = 200 << 20;
/// Between two tries; doubled up to the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Ask the replica.
    Try,
    /// Look again then, or when something changes.
    Wait(Instant),
    /// There will be none.
    GiveUp,
}

/// The deployment, as this node sees it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Seen<'a> {
    /// There.
    Deployment(&'a DeploymentView),
    /// The coordinator says that there is none of that name, or another model has it now.
    Gone,
    /// The coordinator cannot be asked.
    Unknown,
}

/// One wait for a replica.
#[derive(Clone, Debug)]
pub(super) struct Patience {
    within: Duration,
    /// Of the replica that was lost.
    epoch: u64,
    since: Instant,
    /// Since when nobody forms a replica; none while somebody does.
    idle_since: Option<Instant>,
    /// Tries at replicas of this epoch, and when the next one makes sense.
    tries: (u64, u32),
    next_try: Instant,
}

impl Patience {
    /// A replica of this epoch was lost now.
    pub(super) fn new(within: Duration, epoch: u64, now: Instant) -> Self {
        let next_try = now + FIRST_PAUSE;
        Self { within, epoch, since: now, idle_since: Some(now), tries: (epoch, 1), next_try }
    }

    /// What to do, by what is seen.
    pub(super) fn verdict(&mut self, seen: Seen<'_>, now: Instant) -> Verdict {
        if self.within.is_zero() {
            return Verdict::GiveUp;
        }
        let (state, epoch, weights) = match seen {
            Seen::Gone => return Verdict::GiveUp,
            Seen::Unknown => (None, self.epoch, ByteCount(0)),
            Seen::Deployment(it) => {
                let weights = it.stages.iter().map(|stage| stage.weights.0).sum();
                (Some(it.state), it.epoch, ByteCount(weights))
            }
        };
        let is_forming = match state {
            Some(State::Unloading) => return Verdict::GiveUp,
            Some(State::Loading | State::Recovering) => true,
            // A new one is no reason to give up, whatever was before.
            Some(State::Ready) => epoch > self.tries.0,
            Some(State::Failed) | None => false,
        };
        let forming_ends =
            self.since + FORMING + self.within + Duration::from_secs(weights.0 / SLOW_DISK_BYTES_PER_SECOND);
        let ends = match is_forming {
            true => {
                self.idle_since = None;
                forming_ends
            }
            false => (*self.idle_since.get_or_insert(now) + self.within).min(forming_ends),
        };
        if ends <= now {
            return Verdict::GiveUp;
        }
        if state != Some(State::Ready) {
            return Verdict::Wait(ends);
        }
        if epoch != self.tries.0 {
            self.tries = (epoch, 0);
            self.next_try = now;
        }
        match self.next_try <= now {
            true => {
                let doublings = self.tries.1.min(16);
                self.tries.1 = self.tries.1.saturating_add(1);
                self.next_try = now + (FIRST_PAUSE * 2u32.pow(doublings)).min(LONGEST_PAUSE);
                Verdict::Try
            }
            false => Verdict::Wait(self.next_try.min(ends)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(state: State, epoch: u64) -> DeploymentView {
        DeploymentView {
            replica: 1,
            replicas: 1,
            is_pinned: false,
            ttl: None,
            guessing: None,
            name: "m".into(),
            source: "s".into(),
            epoch,
            state,
            detail: String::new(),
            stages: Vec::new(),
            scheduler: None,
            architecture: String::new(),
            context_tokens: 0,
            max_sequences: 0,
            adapters: Vec::new(),
        }
    }

    fn at(patience: &mut Patience, state: State, epoch: u64, now: Instant) -> Verdict {
        patience.verdict(Seen::Deployment(&view(state, epoch)), now)
    }

    const WITHIN: Duration = Duration::from_secs(10);

    #[test]
    fn a_new_replica_is_asked_at_once_and_the_lost_one_ever_more_seldom() {
        let start = Instant::now();
        let mut patience = Patience::new(WITHIN, 7, start);
        // The view is old for a moment: the replica that was lost still looks ready.
        let mut tries = Vec::new();
        let mut now = start;
        while let Verdict::Wait(until) = at(&mut patience, State::Ready, 7, now) {
            now = until;
            if at(&mut patience, State::Ready, 7, now) == Verdict::Try {
                tries.push((now - start).as_millis());
            }
            if tries.len() == 6 {
                break;
            }
        }
        assert_eq!(tries, [50, 150, 350, 750, 1550, 2550]);
        assert!(matches!(at(&mut patience, State::Recovering, 8, now), Verdict::Wait(_)));
        assert_eq!(at(&mut patience, State::Ready, 8, now), Verdict::Try);
        assert_eq!(at(&mut patience, State::Ready, 8, now), Verdict::Wait(now + FIRST_PAUSE));
    }

    #[test]
    fn nobody_waits_long_for_what_nobody_forms() {
        let start = Instant::now();
        for state in [State::Failed, State::Ready] {
            let mut patience = Patience::new(WITHIN, 7, start);
            let mut now = start;
            let end = loop {
                match at(&mut patience, state, 7, now) {
                    Verdict::Wait(until) => now = until,
                    Verdict::Try => {}
                    Verdict::GiveUp => break now,
                }
            };
            assert_eq!(end, start + WITHIN, "{state:?}");
        }
        let mut patience = Patience::new(WITHIN, 7, start);
        assert_eq!(patience.verdict(Seen::Unknown, start), Verdict::Wait(start + WITHIN));
        // Somebody began, and failed: the time begins anew.
        let later = start + WITHIN * 2;
        assert!(matches!(at(&mut patience, State::Loading, 8, later), Verdict::Wait(_)));
        assert_eq!(at(&mut patience, State::Failed, 8, later), Verdict::Wait(later + WITHIN));
        // But not for ever.
        let end = start + FORMING + WITHIN;
        assert_eq!(at(&mut patience, State::Loading, 9, end), Verdict::GiveUp);
    }

    #[test]
    fn what_does_not_come_back_is_not_waited_for() {
        let now = Instant::now();
        let mut patience = Patience::new(WITHIN, 7, now);
        assert_eq!(at(&mut patience, State::Unloading, 7, now), Verdict::GiveUp);
        assert_eq!(patience.verdict(Seen::Gone, now), Verdict::GiveUp);
        assert_eq!(at(&mut Patience::new(Duration::ZERO, 7, now), State::Ready, 8, now), Verdict::GiveUp);
    }

    #[test]
    fn a_large_model_has_time_to_load() {
        let start = Instant::now();
        let mut patience = Patience::new(WITHIN, 7, start);
        let mut large = view(State::Recovering, 8);
        let node = mlxnode_cluster::NodeId::from_bytes([1; 32]);
        large.stages.push(crate::deployments::StageView {
            node,
            node_name: String::new(),
            layers: mlxnode_compute::LayerRange::new(0, 1),
            weights: ByteCount(200 << 30),
            kv: ByteCount(0),
            memory: ByteCount(0),
            pid: None,
        });
        let later = start + FORMING + WITHIN + Duration::from_secs(1000);
        assert!(matches!(patience.verdict(Seen::Deployment(&large), later), Verdict::Wait(_)));
    }
}
