//! Who is alive: a failure detector without clock, sockets or tasks. Events and `now` in, effects out.
//!
//! ```text
//!              heard                     silent for 1.5 s, or link lost and no new one
//! Connecting ────────▶ Alive ─────────────────────────────────────────────────────▶ Suspect
//!      │                 ▲  heard                                                    │ silent for 3 s and nobody
//!      └─ 3 s ─▶ Dead ───┴───────────────◀──────────────────────────────────────────┘ else reaches it
//! ```
//! A link that was reset and a host that refuses a new one is a process that ended: dead at once. With three nodes and more
//! two others are asked before a silent peer is declared dead: if they reach it, the fault is the link between us, and the
//! peer stays suspect. And when my own timers ran late (this process was stopped, the machine slept, the CPU was taken) I
//! accuse nobody for one full timeout, for what I did not hear says nothing then (Lifeguard, Dadgar et al. 2018).

use crate::pin::NodeId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The detector's times.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How often beats are sent.
    pub period: Duration,
    /// Silence after which a peer is suspect: three missed beats.
    pub suspect_after: Duration,
    /// Silence after which it is dead.
    pub dead_after: Duration,
}

impl Timing {
    /// For wired networks.
    pub const WIRED: Self = Self {
        period: Duration::from_millis(500),
        suspect_after: Duration::from_millis(1500),
        dead_after: Duration::from_secs(3),
    };
    /// For Wi-Fi, which is silent for a second or two now and then.
    pub const WIFI: Self = Self {
        period: Duration::from_secs(1),
        suspect_after: Duration::from_secs(3),
        dead_after: Duration::from_secs(6),
    };
}

/// What is known of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// Not heard of yet.
    Connecting,
    /// Heard of lately.
    Alive,
    /// Silent for too long, or its link broke; perhaps only for us.
    Suspect,
    /// Gone, until it is heard of again.
    Dead,
}

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// Time passed. Must come several times per period.
    Tick,
    /// The machine slept.
    Woke,
    /// The roster names these other nodes.
    Roster(Vec<NodeId>),
    /// A beat came. `rtt` when it answered one of ours.
    Heard { peer: NodeId, incarnation: u64, rtt: Option<Duration> },
    /// The link to the peer ended.
    LinkLost { peer: NodeId },
    /// A new link could not be made. `refused`: the host answered that nothing listens there.
    DialFailed { peer: NodeId, refused: bool },
    /// Another node says whether it reaches the peer.
    Answer { about: NodeId, reachable: bool },
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Ask these nodes whether they reach `about`.
    Ask { about: NodeId, of: Vec<NodeId> },
    /// The peer's state is another one now, or it is a new process (`restarted`).
    Changed { peer: NodeId, state: PeerState, restarted: bool },
}

/// How many others are asked about a silent peer.
const ASKED: usize = 2;

/// The failure detector of one node.
#[derive(Debug)]
pub(crate) struct Detector {
    timing: Timing,
    peers: BTreeMap<NodeId, Peer>,
    last_event: Instant,
    /// Nobody is accused before this.
    lenient_until: Option<Instant>,
}

#[derive(Debug)]
struct Peer {
    state: PeerState,
    known_since: Instant,
    heard: Option<Instant>,
    suspect_since: Option<Instant>,
    incarnation: Option<u64>,
    /// Smoothed round trip time.
    rtt: Option<Duration>,
    /// The link ended and no beat came since.
    broken: bool,
    asked: Option<Instant>,
    /// Others reach it; believed until then.
    vouched_until: Option<Instant>,
}

impl Detector {
    pub(crate) fn new(timing: Timing, now: Instant) -> Self {
        Self { timing, peers: BTreeMap::new(), last_event: now, lenient_until: None }
    }

    pub(crate) fn state(&self, peer: &NodeId) -> Option<PeerState> {
        self.peers.get(peer).map(|peer| peer.state)
    }

    pub(crate) fn rtt(&self, peer: &NodeId) -> Option<Duration> {
        self.peers.get(peer)?.rtt
    }

    pub(crate) fn heard(&self, peer: &NodeId) -> Option<Instant> {
        self.peers.get(peer)?.heard
    }

    pub(crate) fn on_event(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        let since_last = now.saturating_duration_since(self.last_event);
        self.last_event = now;
        // Ticks come several times per period, so this much silence from my own timers means that I was not running.
        if since_last > self.timing.period + self.timing.period / 2 || matches!(event, Event::Woke) {
            self.lenient_until = Some(now + self.timing.dead_after);
        }
        let mut effects = Vec::new();
        match event {
            Event::Tick | Event::Woke => self.judge_silence(now, &mut effects),
            Event::Roster(nodes) => {
                self.peers.retain(|id, _| nodes.contains(id));
                for id in nodes {
                    self.peers.entry(id).or_insert_with(|| Peer::new(now));
                }
            }
            Event::Heard { peer, incarnation, rtt } => {
                self.heard_of(peer, incarnation, rtt, now, &mut effects)
            }
            Event::LinkLost { peer } => {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.broken = true;
                }
            }
            Event::DialFailed { peer, refused } => self.dial_failed(peer, refused, now, &mut effects),
            Event::Answer { about, reachable } => {
                let believed = self.ask_again_after() + self.timing.period;
                if let Some(peer) = self.peers.get_mut(&about).filter(|_| reachable) {
                    peer.vouched_until = Some(now + believed);
                }
            }
        }
        effects
    }

    fn heard_of(
        &mut self,
        id: NodeId,
        incarnation: u64,
        rtt: Option<Duration>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let restarted = peer.incarnation.is_some_and(|known| known != incarnation);
        peer.incarnation = Some(incarnation);
        peer.heard = Some(now);
        (peer.suspect_since, peer.asked, peer.vouched_until, peer.broken) = (None, None, None, false);
        if let Some(sample) = rtt {
            // As TCP does (RFC 6298): an eighth of the news.
            peer.rtt = Some(peer.rtt.filter(|_| !restarted).map_or(sample, |known| (known * 7 + sample) / 8));
        }
        if peer.state != PeerState::Alive || restarted {
            peer.state = PeerState::Alive;
            effects.push(Effect::Changed { peer: id, state: PeerState::Alive, restarted });
        }
    }

    fn dial_failed(&mut self, id: NodeId, refused: bool, now: Instant, effects: &mut Vec<Effect>) {
        if self.is_lenient(now) {
            return;
        }
        let Some(peer) = self.peers.get_mut(&id).filter(|peer| peer.broken) else { return };
        if refused && matches!(peer.state, PeerState::Alive | PeerState::Suspect) {
            peer.turn(PeerState::Dead, id, now, effects);
        } else if peer.state == PeerState::Alive {
            peer.turn(PeerState::Suspect, id, now, effects);
            self.ask(id, now, effects);
        }
    }

    fn judge_silence(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.is_lenient(now) {
            return;
        }
        let doubt = self.timing.dead_after - self.timing.suspect_after;
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            let ask_again_after = self.ask_again_after();
            let Some(peer) = self.peers.get_mut(&id) else { continue };
            match peer.state {
                PeerState::Connecting => {
                    if now.saturating_duration_since(peer.known_since) >= self.timing.dead_after {
                        peer.turn(PeerState::Dead, id, now, effects);
                    }
                }
                PeerState::Alive => {
                    let silence =
                        peer.heard.map_or(Duration::MAX, |heard| now.saturating_duration_since(heard));
                    if silence >= self.timing.suspect_after {
                        peer.turn(PeerState::Suspect, id, now, effects);
                        self.ask(id, now, effects);
                    }
                }
                PeerState::Suspect => {
                    let suspect_for = peer
                        .suspect_since
                        .map_or(Duration::MAX, |since| now.saturating_duration_since(since));
                    let vouched = peer.vouched_until.is_some_and(|until| now < until);
                    if suspect_for >= doubt && !vouched {
                        peer.turn(PeerState::Dead, id, now, effects);
                    } else if peer.asked.is_none_or(|at| now.saturating_duration_since(at) >= ask_again_after)
                    {
                        self.ask(id, now, effects);
                    }
                }
                PeerState::Dead => {}
            }
        }
    }

    /// Asks two others who are alive about a peer, with three nodes and more.
    fn ask(&mut self, about: NodeId, now: Instant, effects: &mut Vec<Effect>) {
        let others = self.peers.iter().filter(|(id, peer)| **id != about && peer.state == PeerState::Alive);
        let of: Vec<NodeId> = others.map(|(id, _)| *id).take(ASKED).collect();
        if of.is_empty() {
            return;
        }
        if let Some(peer) = self.peers.get_mut(&about) {
            peer.asked = Some(now);
        }
        effects.push(Effect::Ask { about, of });
    }

    fn ask_again_after(&self) -> Duration {
        self.timing.period * 2
    }

    fn is_lenient(&self, now: Instant) -> bool {
        self.lenient_until.is_some_and(|until| now < until)
    }
}

impl Peer {
    fn new(now: Instant) -> Self {
        Self {
            state: PeerState::Connecting,
            known_since: now,
            heard: None,
            suspect_since: None,
            incarnation: None,
            rtt: None,
            broken: false,
            asked: None,
            vouched_until: None,
        }
    }

    fn turn(&mut self, state: PeerState, id: NodeId, now: Instant, effects: &mut Vec<Effect>) {
        self.state = state;
        self.suspect_since = (state == PeerState::Suspect).then_some(now);
        effects.push(Effect::Changed { peer: id, state, restarted: false });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STEP: Duration = Duration::from_millis(100);

    /// Nodes 1.. as seen by node 0, with a clock of its own.
    struct Story {
        detector: Detector,
        now: Instant,
        effects: Vec<Effect>,
    }

    fn id(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    impl Story {
        fn with_peers(count: u8) -> Self {
            let now = Instant::now();
            let mut story = Self { detector: Detector::new(Timing::WIRED, now), now, effects: vec![] };
            story.event(Event::Roster((1..=count).map(id).collect()));
            for peer in 1..=count {
                story.beat(peer);
            }
            story.effects.clear();
            story
        }

        fn event(&mut self, event: Event) {
            self.effects.extend(self.detector.on_event(event, self.now));
        }

        fn beat(&mut self, peer: u8) {
            self.event(Event::Heard { peer: id(peer), incarnation: 1, rtt: None });
        }

        /// Lets time pass while `talking` send their beats.
        fn pass(&mut self, time: Duration, talking: &[u8]) {
            let end = self.now + time;
            while self.now < end {
                self.now += STEP;
                for peer in talking {
                    self.beat(*peer);
                }
                self.event(Event::Tick);
            }
        }

        fn state(&self, peer: u8) -> PeerState {
            self.detector.state(&id(peer)).unwrap()
        }

        fn asked(&self, about: u8) -> usize {
            self.effects
                .iter()
                .filter(|effect| matches!(effect, Effect::Ask { about: x, .. } if *x == id(about)))
                .count()
        }
    }

    #[test]
    fn a_silent_peer_is_suspect_after_three_misses_and_dead_after_three_seconds() {
        let mut story = Story::with_peers(1);
        story.pass(Duration::from_millis(1400), &[]);
        assert_eq!(story.state(1), PeerState::Alive);
        story.pass(Duration::from_millis(100), &[]);
        assert_eq!(story.state(1), PeerState::Suspect);
        story.pass(Duration::from_millis(1400), &[]);
        assert_eq!(story.state(1), PeerState::Suspect);
        story.pass(Duration::from_millis(100), &[]);
        assert_eq!(story.state(1), PeerState::Dead);
        assert_eq!(story.asked(1), 0, "there is nobody to ask");
        story.beat(1);
        assert_eq!(story.state(1), PeerState::Alive);
    }

    #[test]
    fn a_reset_and_a_refused_reconnect_is_death_at_once() {
        let mut story = Story::with_peers(3);
        story.event(Event::DialFailed { peer: id(1), refused: true });
        assert_eq!(story.state(1), PeerState::Alive, "a link still stands: another address was tried");
        story.event(Event::LinkLost { peer: id(1) });
        assert_eq!(story.state(1), PeerState::Alive, "perhaps only the link broke");
        story.event(Event::DialFailed { peer: id(1), refused: true });
        assert_eq!(story.state(1), PeerState::Dead);
    }

    #[test]
    fn a_reset_and_an_unanswered_reconnect_is_suspicious() {
        let mut story = Story::with_peers(1);
        story.event(Event::LinkLost { peer: id(1) });
        story.event(Event::DialFailed { peer: id(1), refused: false });
        assert_eq!(story.state(1), PeerState::Suspect);
        story.pass(Duration::from_millis(1500), &[]);
        assert_eq!(story.state(1), PeerState::Dead);
    }

    #[test]
    fn a_peer_that_others_reach_is_not_declared_dead() {
        let mut story = Story::with_peers(3);
        for _ in 0..20 {
            story.pass(Duration::from_millis(500), &[2, 3]);
            if story.asked(1) > 0 {
                story.event(Event::Answer { about: id(1), reachable: true });
                story.effects.retain(|effect| !matches!(effect, Effect::Ask { .. }));
            }
        }
        assert_eq!(story.state(1), PeerState::Suspect);
        story.pass(Duration::from_secs(2), &[2, 3]);
        assert_eq!(story.state(1), PeerState::Dead, "nobody vouches any more");
    }

    #[test]
    fn an_early_yes_does_not_delay_a_true_death() {
        let mut story = Story::with_peers(3);
        story.pass(Duration::from_millis(1500), &[2, 3]);
        assert_eq!(story.asked(1), 1);
        // The others heard of it a little later than I did, and do not know yet.
        story.event(Event::Answer { about: id(1), reachable: true });
        story.pass(Duration::from_millis(1500), &[2, 3]);
        assert_eq!(story.asked(1), 2);
        assert_eq!(story.state(1), PeerState::Dead);
    }

    #[test]
    fn who_was_late_itself_accuses_nobody_for_one_full_timeout() {
        for late in [Event::Tick, Event::Woke, Event::LinkLost { peer: id(1) }] {
            let mut story = Story::with_peers(2);
            // Stopped for ten seconds; then everything that was waiting comes at once.
            story.now += if matches!(late, Event::Woke) { STEP } else { Duration::from_secs(10) };
            story.event(late);
            story.event(Event::LinkLost { peer: id(1) });
            story.event(Event::DialFailed { peer: id(1), refused: true });
            story.pass(Duration::from_millis(2900), &[]);
            assert_eq!((story.state(1), story.state(2)), (PeerState::Alive, PeerState::Alive));
            story.beat(2);
            story.pass(Duration::from_millis(200), &[]);
            assert_eq!((story.state(1), story.state(2)), (PeerState::Suspect, PeerState::Alive));
            story.pass(Duration::from_millis(1500), &[2]);
            assert_eq!((story.state(1), story.state(2)), (PeerState::Dead, PeerState::Alive));
        }
    }

    #[test]
    fn a_member_that_never_shows_up_is_dead_and_a_removed_one_is_forgotten() {
        let mut story = Story::with_peers(1);
        story.event(Event::Roster(vec![id(1), id(2)]));
        story.pass(Duration::from_secs(3), &[1]);
        assert_eq!((story.state(1), story.state(2)), (PeerState::Alive, PeerState::Dead));
        story.event(Event::Roster(vec![id(1)]));
        story.beat(2);
        assert_eq!(story.detector.state(&id(2)), None);
    }

    #[test]
    fn a_restart_is_told_and_round_trips_are_smoothed() {
        let mut story = Story::with_peers(1);
        let heard = |incarnation, micros| Event::Heard {
            peer: id(1),
            incarnation,
            rtt: Some(Duration::from_micros(micros)),
        };
        story.event(heard(1, 800));
        story.event(heard(1, 1600));
        assert_eq!(story.detector.rtt(&id(1)), Some(Duration::from_micros(900)));
        assert!(story.effects.is_empty());
        story.event(heard(2, 500));
        assert_eq!(
            story.effects,
            [Effect::Changed { peer: id(1), state: PeerState::Alive, restarted: true }]
        );
        assert_eq!(story.detector.rtt(&id(1)), Some(Duration::from_micros(500)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Beat(u8),
        Lost(u8),
        Failed(u8, bool),
        Answer(u8, bool),
        Pass(u64),
        Stopped(u64),
        Woke,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let peer = || 1..=4u8;
        let step = prop_oneof![
            4 => peer().prop_map(Step::Beat),
            1 => peer().prop_map(Step::Lost),
            1 => (peer(), any::<bool>()).prop_map(|(peer, refused)| Step::Failed(peer, refused)),
            1 => (peer(), any::<bool>()).prop_map(|(peer, yes)| Step::Answer(peer, yes)),
            6 => (1..12u64).prop_map(Step::Pass),
            1 => (800..20_000u64).prop_map(Step::Stopped),
            1 => Just(Step::Woke),
        ];
        proptest::collection::vec(step, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever happens: no accusation while lenient, none without a reason, questions only to others who are alive,
        /// and every change is told exactly once.
        #[test]
        fn the_rules_hold_for_every_story(steps in steps()) {
            let mut story = Story::with_peers(4);
            let mut told: BTreeMap<NodeId, PeerState> = (1..=4).map(|peer| (id(peer), PeerState::Alive)).collect();
            let mut heard: BTreeMap<NodeId, Instant> = (1..=4).map(|peer| (id(peer), story.now)).collect();
            let mut broken: BTreeMap<NodeId, bool> = BTreeMap::new();
            let mut vouched: BTreeMap<NodeId, Instant> = BTreeMap::new();
            let mut lenient_until = story.now;
            for step in steps {
                let mut refused = None;
                let (event, ticks) = match step {
                    Step::Beat(peer) => {
                        heard.insert(id(peer), story.now);
                        broken.insert(id(peer), false);
                        (Some(Event::Heard { peer: id(peer), incarnation: 1, rtt: None }), 0)
                    }
                    Step::Lost(peer) => {
                        broken.insert(id(peer), true);
                        (Some(Event::LinkLost { peer: id(peer) }), 0)
                    }
                    Step::Failed(peer, gone) => {
                        refused = gone.then_some(id(peer));
                        (Some(Event::DialFailed { peer: id(peer), refused: gone }), 0)
                    }
                    Step::Answer(peer, reachable) => {
                        if reachable {
                            vouched.insert(id(peer), story.now);
                        }
                        (Some(Event::Answer { about: id(peer), reachable }), 0)
                    }
                    Step::Pass(ticks) => (None, ticks),
                    Step::Stopped(millis) => {
                        story.now += Duration::from_millis(millis);
                        lenient_until = story.now + Timing::WIRED.dead_after;
                        (Some(Event::Tick), 0)
                    }
                    Step::Woke => {
                        lenient_until = story.now + Timing::WIRED.dead_after;
                        (Some(Event::Woke), 0)
                    }
                };
                let mut events: Vec<Event> = event.into_iter().collect();
                events.extend((0..ticks).map(|_| Event::Tick));
                for event in events {
                    if ticks > 0 {
                        story.now += STEP;
                    }
                    for effect in story.detector.on_event(event, story.now) {
                        match effect {
                            Effect::Ask { about, of } => {
                                prop_assert!(!of.contains(&about) && of.len() <= 2 && !of.is_empty());
                                prop_assert!(of.iter().all(|other| told[other] == PeerState::Alive));
                            }
                            Effect::Changed { peer, state, restarted } => {
                                prop_assert!(!restarted && told[&peer] != state, "told twice: {peer} {state:?}");
                                let silence = story.now - heard[&peer];
                                let was_broken = broken.get(&peer).copied().unwrap_or_default();
                                if state != PeerState::Alive {
                                    prop_assert!(story.now >= lenient_until, "accused while lenient");
                                }
                                if state == PeerState::Suspect {
                                    prop_assert!(was_broken || silence >= Timing::WIRED.suspect_after);
                                }
                                if state == PeerState::Dead {
                                    let at_once = was_broken && refused == Some(peer);
                                    let in_doubt = Timing::WIRED.dead_after - Timing::WIRED.suspect_after;
                                    prop_assert!(at_once || silence >= in_doubt, "dead after {silence:?}");
                                    let fresh = vouched.get(&peer).is_some_and(|at| story.now - *at < Duration::from_secs(1));
                                    prop_assert!(at_once || !fresh || heard[&peer] > vouched[&peer], "dead though vouched for");
                                }
                                told.insert(peer, state);
                            }
                        }
                    }
                }
                for (peer, state) in &told {
                    prop_assert_eq!(story.detector.state(peer), Some(*state));
                }
            }
            // And in the end: silence without excuse is death, a beat is life.
            story.pass(Timing::WIRED.dead_after * 3, &[2]);
            prop_assert_eq!(story.state(1), PeerState::Dead);
            prop_assert_eq!(story.state(2), PeerState::Alive);
        }
    }
}
