//! Who belongs to the group of a job, and from which step it goes on.
//!
//! ```text
//!              enough are there, or patience is over            all have stopped
//!  Gathering ─────────────────────────────────────▶ Halting ─────────────────────▶ Running
//!      ▲ nobody is left                               ▲  one joins (at a step's border), is lost, or cannot be reached
//!      └──────────────────────────────────────────────┴──────────────────────────────┘
//! ```
//!
//! Every formation has an epoch of its own. Before a new one, every member says that it has stopped and how far it is; then all go on
//! from the furthest one's step. Members that are behind get what they lack from one that has it.

use crate::dealing::MOST_MEMBERS;
use crate::{CatchUp, Formation, MemberId, Order, Report};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How patient the rounds are.
#[derive(Clone, Copy, Debug)]
pub struct RoundsOptions {
    /// Workers that were started for the job.
    pub expected: usize,
    /// How long the first one waits for the others.
    pub gather_within: Duration,
    /// How long a member may take to say that it has stopped. It does so between two frames, however long its steps take.
    pub halt_within: Duration,
    /// How long a step may take before the members that have not done their part are given up.
    pub step_within: Duration,
}

impl Default for RoundsOptions {
    fn default() -> Self {
        Self {
            expected: 1,
            gather_within: Duration::from_secs(60),
            halt_within: Duration::from_secs(10),
            step_within: Duration::from_secs(600),
        }
    }
}

/// Formations without a step between them, after which the member that was named most often has to go.
const STRIKES: u32 = 3;
/// Sums whose hashes are kept. Members are at most a step apart, but their reports come on ways of their own.
const HASHES_KEPT: usize = 8;

/// What the rounds want done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RoundsEffect {
    /// Tell this member to stop, see [`crate::Member::halt`].
    Halt {
        /// Whom.
        member: MemberId,
        /// For which epoch.
        epoch: u64,
        /// After so many updates.
        at: u64,
    },
    /// Tell this member of its formation.
    Form {
        /// Whom.
        member: MemberId,
        /// What.
        formation: Formation,
    },
    /// End this worker: it is not counted any more.
    Evict {
        /// Whom.
        member: MemberId,
        /// Why, for people.
        reason: String,
    },
    /// The job cannot go on.
    Fail {
        /// Why, for people.
        reason: String,
    },
}

/// What the rounds look like from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundsSummary {
    /// The newest epoch.
    pub epoch: u64,
    /// Workers that take part or are about to.
    pub members: usize,
    /// Updates that the furthest one has made.
    pub step: u64,
    /// Steps are under way.
    pub running: bool,
}

/// The rounds of one job.
#[derive(Debug)]
pub struct Rounds {
    options: RoundsOptions,
    epoch: u64,
    members: BTreeMap<MemberId, Entry>,
    phase: Phase,
    /// The epoch of the last formation that was told.
    formed: Option<u64>,
    /// Hashes of the last steps' sums, by step.
    agreed: BTreeMap<u64, [u8; 32]>,
    /// Hashes of the members' parameters, after so many updates.
    compared: (u64, BTreeMap<MemberId, [u8; 32]>),
    /// Updates that the furthest one has made.
    step: u64,
    /// Steps in a row that took too long although everybody did its part: each gives the next one twice the time.
    stuck: u32,
}

#[derive(Debug, Default)]
struct Entry {
    stopped: Option<Stopped>,
    /// It belonged to the last formation: a part of its step was expected from it.
    took_part: bool,
    strikes: u32,
}

#[derive(Clone, Copy, Debug)]
struct Stopped {
    position: u64,
    holds_sum: bool,
    contributed: bool,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Gathering {
        since: Option<Instant>,
    },
    /// `overdue`: a step took too long.
    Halting {
        since: Instant,
        at: u64,
        overdue: bool,
    },
    Running {
        since: Instant,
    },
}

impl Rounds {
    /// Nobody yet. `epoch` is the newest one that the job has had, 0 at first: it goes on from there, so that what is left of
    /// earlier attempts is told apart.
    pub fn new(options: RoundsOptions, epoch: u64) -> Self {
        let phase = Phase::Gathering { since: None };
        let (members, agreed, compared) = (BTreeMap::new(), BTreeMap::new(), (0, BTreeMap::new()));
        Self { options, epoch, members, phase, formed: None, agreed, compared, step: 0, stuck: 0 }
    }

    /// For people.
    pub fn summary(&self) -> RoundsSummary {
        let running = matches!(self.phase, Phase::Running { .. });
        RoundsSummary { epoch: self.epoch, members: self.members.len(), step: self.step, running }
    }

    /// A member says something. [`Report::Ready`] makes it one.
    pub fn report(&mut self, member: MemberId, report: Report, now: Instant) -> Vec<RoundsEffect> {
        match report {
            Report::Ready { position } => self.joined(member, position, now),
            _ if !self.members.contains_key(&member) => vec![],
            Report::Halted { epoch, position, holds_sum, contributed } => {
                self.stopped(member, epoch, Stopped { position, holds_sum, contributed }, now)
            }
            Report::Applied { epoch, step, hash } => self.applied(member, epoch, step, hash, now),
            Report::Parameters { updates, hash } => self.compare(member, updates, hash, now),
            Report::Broken { epoch, peer, .. } => self.broken(member, epoch, peer, now),
        }
    }

    fn joined(&mut self, member: MemberId, position: u64, now: Instant) -> Vec<RoundsEffect> {
        if !self.members.contains_key(&member) && self.members.len() >= MOST_MEMBERS {
            let reason = format!("a job has at most {MOST_MEMBERS} workers");
            return vec![RoundsEffect::Evict { member, reason }];
        }
        self.members.insert(member, Entry::default());
        match self.phase {
            Phase::Gathering { since } => {
                self.step = self.step.max(position);
                let since = since.unwrap_or(now);
                self.phase = Phase::Gathering { since: Some(since) };
                self.gathered(since, now)
            }
            // The furthest one may be a step ahead of what it told. Those who are past this border already stop at once.
            Phase::Running { .. } => self.halt(self.step + 2, now),
            Phase::Halting { at, overdue, .. } => {
                let effects = self.halt(at, now);
                self.phase = Phase::Halting { since: now, at, overdue };
                effects
            }
        }
    }

    fn gathered(&mut self, since: Instant, now: Instant) -> Vec<RoundsEffect> {
        let complete = self.members.len() >= self.options.expected;
        let waited = now.saturating_duration_since(since) >= self.options.gather_within;
        if complete || waited { self.halt(0, now) } else { vec![] }
    }

    /// This worker has ended.
    pub fn lost(&mut self, member: MemberId, now: Instant) -> Vec<RoundsEffect> {
        if self.members.remove(&member).is_none() {
            return vec![];
        }
        if self.members.is_empty() {
            self.phase = Phase::Gathering { since: None };
            return vec![];
        }
        match self.phase {
            Phase::Gathering { .. } => vec![],
            Phase::Running { .. } | Phase::Halting { .. } => self.halt(0, now),
        }
    }

    /// Asks all members to stop for a new epoch.
    fn halt(&mut self, at: u64, now: Instant) -> Vec<RoundsEffect> {
        self.epoch += 1;
        self.phase = Phase::Halting { since: now, at, overdue: false };
        let epoch = self.epoch;
        self.members
            .iter_mut()
            .map(|(&member, entry)| {
                entry.stopped = None;
                RoundsEffect::Halt { member, epoch, at }
            })
            .collect()
    }

    fn stopped(&mut self, member: MemberId, epoch: u64, stopped: Stopped, now: Instant) -> Vec<RoundsEffect> {
        let Phase::Halting { overdue, .. } = self.phase else { return vec![] };
        if epoch != self.epoch {
            return vec![];
        }
        if let Some(entry) = self.members.get_mut(&member) {
            entry.stopped = Some(stopped);
        }
        if self.members.values().any(|entry| entry.stopped.is_none()) {
            return vec![];
        }
        let contributed = |entry: &Entry| entry.stopped.is_some_and(|stopped| stopped.contributed);
        // When nobody had done its part, the step is just long. Who has joined since had no part to do.
        if overdue && self.members.values().any(contributed) {
            let idle = self.members.iter().filter(|(_, entry)| entry.took_part && !contributed(entry));
            let idle: Vec<_> = idle.map(|(&id, _)| id).collect();
            if !idle.is_empty() {
                let seconds = self.options.step_within.as_secs();
                let reason = format!("it did not do its part of a step within {seconds} s");
                return self.evict(&idle, &reason, now);
            }
        }
        self.form(now)
    }

    fn form(&mut self, now: Instant) -> Vec<RoundsEffect> {
        let stopped: Vec<_> =
            self.members.iter().filter_map(|(&member, entry)| Some((member, entry.stopped?))).collect();
        let Some(step) = stopped.iter().map(|(_, stopped)| stopped.position).max() else { return vec![] };
        let ahead = |holds_sum: bool| {
            let found =
                stopped.iter().find(|(_, there)| there.position == step && (there.holds_sum || !holds_sum));
            found.map(|&(member, _)| member)
        };
        let members = stopped
            .iter()
            .map(|&(member, there)| {
                let lacks_one = there.position + 1 == step;
                let catch_up = match (ahead(true), ahead(false)) {
                    _ if there.position == step => CatchUp::Nothing,
                    (Some(source), _) if lacks_one => CatchUp::Sum(source),
                    (_, Some(source)) => CatchUp::State(source),
                    (_, None) => CatchUp::Nothing, // cannot be: somebody has the highest position
                };
                Order { member, catch_up }
            })
            .collect();
        self.step = step;
        // Steps from here on are made anew, where all that had their sums are lost.
        self.agreed.split_off(&step);
        self.formed = Some(self.epoch);
        self.members.values_mut().for_each(|entry| entry.took_part = true);
        self.phase = Phase::Running { since: now };
        let formation = Formation { epoch: self.epoch, step, members };
        let form = |&member: &MemberId| RoundsEffect::Form { member, formation: formation.clone() };
        self.members.keys().map(form).collect()
    }

    fn applied(
        &mut self,
        member: MemberId,
        epoch: u64,
        step: u64,
        hash: [u8; 32],
        now: Instant,
    ) -> Vec<RoundsEffect> {
        // Told late, from a formation that has ended: it counts when the member says where it stopped.
        if epoch != self.epoch && !matches!(self.phase, Phase::Halting { .. }) {
            return vec![];
        }
        self.step = self.step.max(step + 1);
        if self.agreed.get(&step).is_some_and(|other| *other != hash) {
            let reason = format!(
                "the workers disagree about the gradient of step {step} (worker {member} has another sum): \
                 one of them computes wrongly, or its memory is damaged"
            );
            return vec![RoundsEffect::Fail { reason }];
        }
        self.agreed.insert(step, hash);
        while self.agreed.len() > HASHES_KEPT {
            self.agreed.pop_first();
        }
        if let Phase::Running { since } = &mut self.phase {
            *since = now;
            self.stuck = 0;
            self.members.values_mut().for_each(|entry| entry.strikes = 0);
        }
        vec![]
    }

    /// The same sums make the same parameters, unless a member's processor rounds otherwise or its memory is damaged: then its gradients
    /// are of another model. When all have told theirs, those go that have other ones than most, or than the oldest where none are most.
    /// A worker that takes such a one's place begins with the others' state.
    fn compare(&mut self, member: MemberId, updates: u64, hash: [u8; 32], now: Instant) -> Vec<RoundsEffect> {
        if updates < self.compared.0 {
            return vec![];
        }
        if updates > self.compared.0 {
            self.compared = (updates, BTreeMap::new());
        }
        self.compared.1.insert(member, hash);
        self.compared.1.retain(|member, _| self.members.contains_key(member));
        let told = &self.compared.1;
        if told.len() < self.members.len() {
            return vec![];
        }
        let votes = |hash: &[u8; 32]| told.values().filter(|other| *other == hash).count();
        let best = told.iter().max_by_key(|(member, hash)| (votes(hash), std::cmp::Reverse(**member)));
        let Some(best) = best.map(|(_, hash)| *hash) else { return vec![] };
        let odd: Vec<_> = told.iter().filter(|(_, hash)| **hash != best).map(|(&member, _)| member).collect();
        if odd.is_empty() {
            return vec![];
        }
        let reason = format!(
            "after {updates} updates its parameters are not those of the others: it computes otherwise, or its memory is damaged"
        );
        self.evict(&odd, &reason, now)
    }

    fn broken(&mut self, member: MemberId, epoch: u64, peer: MemberId, now: Instant) -> Vec<RoundsEffect> {
        // While one joins the formation goes on up to the border: without this one it would not get there.
        let is_under_way = match self.phase {
            Phase::Gathering { .. } => false,
            Phase::Halting { at, .. } => at > 0,
            Phase::Running { .. } => true,
        };
        if !is_under_way || self.formed != Some(epoch) {
            return vec![];
        }
        for accused in [peer, member] {
            if let Some(entry) = self.members.get_mut(&accused) {
                entry.strikes += 1;
            }
        }
        // Of two that cannot reach each other the younger one goes, unless one of them has trouble with others too.
        let worst = self.members.iter().max_by_key(|(member, entry)| (entry.strikes, **member));
        match worst {
            Some((&worst, entry)) if entry.strikes >= STRIKES && self.members.len() > 1 => {
                self.evict(&[worst], "the other workers cannot exchange gradients with it", now)
            }
            _ => self.halt(0, now),
        }
    }

    fn evict(&mut self, members: &[MemberId], reason: &str, now: Instant) -> Vec<RoundsEffect> {
        let mut effects = Vec::new();
        for &member in members {
            self.members.remove(&member);
            effects.push(RoundsEffect::Evict { member, reason: reason.to_owned() });
        }
        if self.members.is_empty() {
            self.phase = Phase::Gathering { since: None };
        } else {
            effects.extend(self.halt(0, now));
        }
        effects
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant) -> Vec<RoundsEffect> {
        let over = |since: Instant, limit: Duration| now.saturating_duration_since(since) >= limit;
        match self.phase {
            Phase::Gathering { since: Some(since) } => self.gathered(since, now),
            Phase::Halting { since, at: 0, .. } if over(since, self.options.halt_within) => {
                let silent = self.members.iter().filter(|(_, entry)| entry.stopped.is_none());
                let silent: Vec<_> = silent.map(|(&member, _)| member).collect();
                let seconds = self.options.halt_within.as_secs();
                self.evict(&silent, &format!("it did not answer within {seconds} s"), now)
            }
            // The step before the border takes too long: without it, then.
            Phase::Halting { since, .. } if over(since, self.options.step_within) => self.halt(0, now),
            Phase::Running { since } if over(since, self.options.step_within * 2_u32.pow(self.stuck)) => {
                self.stuck = (self.stuck + 1).min(6);
                let effects = self.halt(0, now);
                self.phase = Phase::Halting { since: now, at: 0, overdue: true };
                effects
            }
            _ => vec![],
        }
    }
}
