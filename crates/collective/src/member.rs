//! One worker's side of the group: hears its trainer, the other members and the rounds, and says what follows.
//!
//! The rule of commitment: a member counts as one step further from the moment it hands the whole sum to its trainer, which applies
//! it before it asks for anything else. Since a sum is whole only when every member gave its part, and a member gives its part of a
//! step only after all steps before, two members are never more than one step apart. The one behind gets that one sum from one
//! ahead (who keeps it until its next) or else the whole state; so no update is made twice, and none is left out.

use crate::exchange::{Circle, Exchange, Piece};
use crate::gather::Gather;
use crate::{CatchUp, Formation, MemberId, Slices, deal};
use bytes::Bytes;
use mlxnode_compute::{Deal, Partial, Sum, Tally, TreeNode};

/// What members say to each other. Every frame belongs to the epoch of the stream that it comes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// A piece of the sum over a node that the sender computed, for who owns the slice.
    Part {
        /// Updates made before.
        step: u64,
        /// Which micro-batches.
        node: TreeNode,
        /// Where the piece begins, in values from the beginning of the whole vector.
        offset: usize,
        /// f32 little-endian.
        values: Bytes,
    },
    /// What the sender counted.
    Tally {
        /// Updates made before.
        step: u64,
        /// Which micro-batches.
        node: TreeNode,
        /// Their tally.
        tally: Tally,
    },
    /// The sender computes nothing of the step, and has come to it: nobody gets further ahead of an idle member either.
    Idle {
        /// Updates made before.
        step: u64,
    },
    /// A piece of the sum over all micro-batches.
    Sum {
        /// Updates made before.
        step: u64,
        /// As in a part.
        offset: usize,
        /// f32 little-endian.
        values: Bytes,
    },
}

/// A frame that does not belong where it came. Whoever sent it is not followed any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// From an earlier or a later formation.
    #[error("it is of epoch {found}, and this member is in {expected}")]
    Epoch {
        /// Where this one is.
        expected: u64,
        /// Whence it came.
        found: u64,
    },
    /// From somebody else.
    #[error("worker {0} does not belong to the formation")]
    Stranger(MemberId),
    /// A step that nobody can be in.
    #[error("it is of step {found}, and this member is in {expected}")]
    Step {
        /// Where this one is.
        expected: u64,
        /// What it said.
        found: u64,
    },
    /// Micro-batches that the sender does not compute.
    #[error("micro-batches {} to {} are not the sender's", .0.start, .0.end)]
    Node(TreeNode),
    /// A member said that it computes nothing, which it does, or said it twice.
    #[error("the sender is not idle in this step, or said so twice")]
    Idle,
    /// A place where no piece begins, or one of another slice.
    #[error("no piece for this exchange begins at value {0}")]
    Offset(usize),
    /// A piece of the wrong length.
    #[error("a piece of {expected} bytes has {found}")]
    Length {
        /// What it should have.
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// A piece that was here before.
    #[error("the piece at value {offset} of micro-batches {} to {} came twice", node.start, node.end)]
    Again {
        /// Which micro-batches.
        node: TreeNode,
        /// Which piece.
        offset: usize,
    },
}

/// What a member tells the rounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Its trainer is there and has made so many updates.
    Ready {
        /// Updates.
        position: u64,
    },
    /// It takes part in no formation before `epoch` any more.
    Halted {
        /// As it was asked.
        epoch: u64,
        /// Updates made or handed out.
        position: u64,
        /// It has the last update's sum.
        holds_sum: bool,
        /// It had given its part of the step that was given up.
        contributed: bool,
    },
    /// It has the sum of a step.
    Applied {
        /// In which formation.
        epoch: u64,
        /// Which step.
        step: u64,
        /// BLAKE3 of the sum.
        hash: [u8; 32],
    },
    /// What is trained, as it is there.
    Parameters {
        /// Updates that made it.
        updates: u64,
        /// BLAKE3 of all of it.
        hash: [u8; 32],
    },
    /// It cannot go on with this member.
    Broken {
        /// In which formation.
        epoch: u64,
        /// With whom.
        peer: MemberId,
        /// Why.
        reason: String,
    },
}

/// What follows from an event.
#[derive(Clone, Debug, PartialEq)]
pub enum MemberEffect {
    /// To another member, on the stream of the epoch under way.
    Send {
        /// To whom.
        to: MemberId,
        /// What.
        frame: Frame,
    },
    /// To the rounds.
    Report(Report),
    /// A new formation: streams of other epochs end, and those of this one begin.
    Formed {
        /// Its epoch.
        epoch: u64,
        /// All members but this one.
        peers: Vec<MemberId>,
    },
    /// The formation under way ended here: its streams end.
    Dissolved,
    /// Get the state of this member, then call [`Member::state_arrived`].
    Fetch {
        /// In which formation.
        epoch: u64,
        /// From whom.
        from: MemberId,
    },
    /// The state that was written by the trainer may be given to who asks for it.
    Saved {
        /// In which formation.
        epoch: u64,
    },
    /// Answer to the trainer.
    Answer(Answer),
}

/// What the trainer's call returns.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// To `begin`: compute.
    Deal(Deal),
    /// To `begin`: write the state.
    Save,
    /// To `begin`: take over the state that was fetched.
    Load,
    /// To `reduce`: the sum.
    Sum(Sum),
    /// To `reduce`: compute this instead.
    Redeal(Deal),
    /// To `reduce`: begin again.
    Begin,
    /// The trainer and the group do not agree.
    OutOfStep(String),
}

/// One worker's side.
#[derive(Debug)]
pub struct Member {
    me: MemberId,
    values: usize,
    micro_batches: u32,
    /// Updates made or handed out; unknown until the trainer has begun.
    position: Option<u64>,
    /// The newest one heard of and entered.
    epoch: u64,
    running: Option<Running>,
    /// To stop in favour of this epoch, once so many updates are made.
    halting: Option<(u64, u64)>,
    /// Of the last update.
    last: Option<Sum>,
    asked: Option<Asked>,
    /// The trainer is writing its state.
    saving: bool,
}

/// What the trainer waits for.
#[derive(Debug)]
enum Asked {
    Begin { applied: u64 },
    Reduce(Deal),
}

#[derive(Debug)]
struct Running {
    formation: Formation,
    circle: Circle,
    current: Exchange,
    /// Members that have this step's sum already may send parts of the next.
    next: Option<Exchange>,
    catching_up: Option<CatchingUp>,
    /// Somebody needs the state of this one before it goes on.
    owes_state: bool,
}

#[derive(Debug)]
enum CatchingUp {
    Sum { from: MemberId, gather: Gather, tally: Option<Tally> },
    State { arrived: bool },
}

impl Member {
    /// A worker whose gradient has `values` numbers, of jobs with `micro_batches` a step.
    pub fn new(me: MemberId, values: usize, micro_batches: u32) -> Self {
        Self {
            me,
            values,
            micro_batches,
            position: None,
            epoch: 0,
            running: None,
            halting: None,
            last: None,
            asked: None,
            saving: false,
        }
    }

    /// Who it is.
    pub fn id(&self) -> MemberId {
        self.me
    }

    /// The formation under way.
    pub fn running_epoch(&self) -> Option<u64> {
        self.running.as_ref().map(|running| running.formation.epoch)
    }

    /// The newest epoch that it has entered or stopped for: nothing older counts.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What the trainer is waiting for, for people.
    pub fn waiting_for(&self) -> String {
        match (&self.running, &self.asked) {
            (None, _) => "the formation of the group".to_owned(),
            (Some(running), Some(Asked::Begin { .. })) if running.catching_up.is_some() => {
                "the state of another worker".to_owned()
            }
            (Some(running), _) => format!("the other workers' parts of step {}", running.current.step()),
        }
    }

    // === The trainer ===

    /// The trainer asks what to do next.
    pub fn begin(&mut self, applied: u64) -> Vec<MemberEffect> {
        let mut effects = Vec::new();
        match self.position {
            None => {
                self.position = Some(applied);
                effects.push(MemberEffect::Report(Report::Ready { position: applied }));
            }
            Some(position) if position == applied || self.holds_sum_after(applied) => {}
            Some(position) => {
                let reason = format!("the trainer made {applied} updates, the group counts {position}");
                return vec![MemberEffect::Answer(Answer::OutOfStep(reason))];
            }
        }
        // What was written is good for any formation at this step, also one that came meanwhile: it is not written twice, as the first
        // may be on its way already.
        if std::mem::take(&mut self.saving)
            && let Some(running) = &mut self.running
            && running.formation.step == applied
        {
            running.owes_state = false;
            effects.push(MemberEffect::Saved { epoch: running.formation.epoch });
        }
        self.asked = Some(Asked::Begin { applied });
        self.answer(&mut effects);
        effects
    }

    /// The trainer gives its parts and asks for the sum.
    pub fn reduce(&mut self, deal: Deal, partials: &[Partial]) -> Vec<MemberEffect> {
        let mut effects = Vec::new();
        let in_time = self.position == Some(deal.step) && !self.is_over(&deal);
        if in_time && let Err(reason) = self.contribute(&deal, partials, &mut effects) {
            return vec![MemberEffect::Answer(Answer::OutOfStep(reason))];
        }
        self.asked = Some(Asked::Reduce(deal));
        self.commit(&mut effects);
        self.answer(&mut effects);
        effects
    }

    /// Is computing on for `deal` of no use any more?
    pub fn is_over(&self, deal: &Deal) -> bool {
        let stopping = self.halting.is_some_and(|(_, at)| at <= deal.step);
        self.running_epoch() != Some(deal.epoch) || stopping
    }

    fn contribute(
        &mut self,
        deal: &Deal,
        partials: &[Partial],
        effects: &mut Vec<MemberEffect>,
    ) -> Result<(), String> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let circle = &running.circle;
        let nodes: Vec<_> = partials.iter().map(|partial| partial.node).collect();
        if nodes != circle.my_nodes() || running.current.contributed() {
            return Err(format!("parts of {nodes:?} came for {:?}", circle.my_nodes()));
        }
        if let Some(partial) = partials.iter().find(|partial| partial.values.len() != self.values * 4) {
            return Err(format!("{} bytes came for {} values", partial.values.len(), self.values));
        }
        let step = deal.step;
        let others = (0..circle.members.len()).filter(|&place| place != circle.me);
        for place in others {
            let to = circle.members[place];
            if partials.is_empty() {
                effects.push(MemberEffect::Send { to, frame: Frame::Idle { step } });
            }
            for partial in partials {
                let tally = Frame::Tally { step, node: partial.node, tally: partial.tally };
                effects.push(MemberEffect::Send { to, frame: tally });
            }
            // Piece by piece with all its parts, so that the owner can add and pass it on at once.
            for piece in circle.slices.chunks(place) {
                for partial in partials {
                    let values = partial.values.slice(piece.start * 4..piece.end * 4);
                    let frame = Frame::Part { step, node: partial.node, offset: piece.start, values };
                    effects.push(MemberEffect::Send { to, frame });
                }
            }
        }
        let done = running.current.contribute(circle, partials).map_err(|error| error.to_string())?;
        done.into_iter().for_each(|piece| pass_on(circle, step, &piece, effects));
        Ok(())
    }

    // === The rounds ===

    /// Stop for `epoch`, once `at` updates are made; 0: at once, giving up the step under way.
    pub fn halt(&mut self, epoch: u64, at: u64) -> Vec<MemberEffect> {
        let mut effects = Vec::new();
        if epoch > self.epoch && self.halting.is_none_or(|(earlier, _)| epoch > earlier) {
            self.halting = Some((epoch, at));
            self.stop_if_due(&mut effects);
        }
        effects
    }

    fn stop_if_due(&mut self, effects: &mut Vec<MemberEffect>) {
        let (Some((epoch, at)), Some(position)) = (self.halting, self.position) else { return };
        if self.running.is_some() && position < at {
            return;
        }
        self.halting = None;
        self.epoch = epoch;
        let given_up = self.running.take();
        if given_up.is_some() {
            effects.push(MemberEffect::Dissolved);
        }
        let contributed = given_up.is_some_and(|running| running.current.contributed());
        let holds_sum = position.checked_sub(1).is_some_and(|before| self.holds_sum_after(before));
        let report = Report::Halted { epoch, position, holds_sum, contributed };
        effects.push(MemberEffect::Report(report));
    }

    /// Go on in this formation. Ignored when it is older than what this member has heard, or does not name it.
    pub fn form(&mut self, formation: Formation) -> Vec<MemberEffect> {
        let mut effects = Vec::new();
        let (Some(place), Some(position)) = (formation.place(self.me), self.position) else { return effects };
        let overtaken = self.halting.is_some_and(|(epoch, _)| epoch > formation.epoch);
        if formation.epoch < self.epoch || self.running.is_some() || overtaken {
            return effects;
        }
        let members: Vec<_> = formation.members.iter().map(|order| order.member).collect();
        let circle = Circle {
            runs: deal(self.micro_batches, members.len()),
            micro_batches: self.micro_batches,
            slices: Slices::new(self.values, members.len()),
            me: place,
            members,
        };
        let epoch = formation.epoch;
        let peers = circle.members.iter().copied().filter(|&member| member != self.me).collect();
        effects.push(MemberEffect::Formed { epoch, peers });
        let catching_up = match formation.members[place].catch_up {
            CatchUp::Nothing => None,
            CatchUp::Sum(from) => {
                let gather = Gather::new(position, &circle.slices, circle.members.len());
                Some(CatchingUp::Sum { from, gather, tally: None })
            }
            CatchUp::State(from) => {
                effects.push(MemberEffect::Fetch { epoch, from });
                Some(CatchingUp::State { arrived: false })
            }
        };
        if let Some(last) = &self.last {
            let to = formation.sums_from(self.me);
            to.for_each(|to| send_sum(&circle, to, last, &mut effects));
        }
        self.epoch = epoch;
        self.running = Some(Running {
            current: Exchange::new(formation.step, &circle),
            next: None,
            catching_up,
            owes_state: formation.needs_state_of(self.me),
            formation,
            circle,
        });
        self.answer(&mut effects);
        effects
    }

    /// The state that [`MemberEffect::Fetch`] asked for is here.
    pub fn state_arrived(&mut self, epoch: u64) -> Vec<MemberEffect> {
        let mut effects = Vec::new();
        if let Some(Running { formation, catching_up: Some(CatchingUp::State { arrived }), .. }) =
            &mut self.running
            && formation.epoch == epoch
        {
            *arrived = true;
            self.answer(&mut effects);
        }
        effects
    }

    // === The other members ===

    /// A frame from `from`, on its stream of `epoch`.
    ///
    /// # Errors
    ///
    /// [`FrameError`]: the stream is not to be read any further, and [`Self::broken`] to be called.
    pub fn frame(
        &mut self,
        from: MemberId,
        epoch: u64,
        frame: Frame,
    ) -> Result<Vec<MemberEffect>, FrameError> {
        let expected = self.epoch;
        let running = self.running.as_mut().filter(|running| running.formation.epoch == epoch);
        let running = running.ok_or(FrameError::Epoch { expected, found: epoch })?;
        let circle = &running.circle;
        let place = circle.members.iter().position(|&member| member == from);
        let place = place.filter(|&place| place != circle.me).ok_or(FrameError::Stranger(from))?;
        let mut effects = Vec::new();
        if let Some(CatchingUp::Sum { from: source, gather, tally }) = &mut running.catching_up
            && *source == from
            && frame.step() == gather.step()
        {
            take_sum(circle, gather, tally, frame)?;
        } else {
            let step = frame.step();
            let expected = running.current.step();
            let exchange = match step.checked_sub(expected) {
                Some(0) => &mut running.current,
                Some(1) => running.next.get_or_insert_with(|| Exchange::new(step, circle)),
                _ => return Err(FrameError::Step { expected, found: step }),
            };
            match frame {
                Frame::Part { node, offset, values, .. } => {
                    if let Some(piece) = exchange.part(circle, place, node, offset, values)? {
                        pass_on(circle, step, &piece, &mut effects);
                    }
                }
                Frame::Tally { node, tally, .. } => exchange.tally(circle, place, node, tally)?,
                Frame::Idle { .. } => exchange.idle(place)?,
                Frame::Sum { offset, values, .. } => exchange.sum(circle, place, offset, &values)?,
            }
        }
        self.commit(&mut effects);
        self.answer(&mut effects);
        Ok(effects)
    }

    /// The stream to or from `peer` ended, or what came on it was wrong.
    pub fn broken(&mut self, epoch: u64, peer: MemberId, reason: String) -> Vec<MemberEffect> {
        if self.running_epoch() == Some(epoch) {
            vec![MemberEffect::Report(Report::Broken { epoch, peer, reason })]
        } else {
            vec![]
        }
    }

    // === What follows ===

    fn holds_sum_after(&self, applied: u64) -> bool {
        let held = self.last.as_ref().is_some_and(|last| last.step == applied);
        held && self.position == Some(applied + 1)
    }

    /// Takes the step's sum when it is whole: from here on it counts as applied.
    fn commit(&mut self, effects: &mut Vec<MemberEffect>) {
        let Some(running) = &mut self.running else { return };
        let caught_up = match &running.catching_up {
            Some(CatchingUp::Sum { gather, tally: Some(_), .. }) => gather.is_complete(),
            _ => false,
        };
        let sum = if caught_up {
            match running.catching_up.take() {
                Some(CatchingUp::Sum { gather, tally: Some(tally), .. }) => Some(gather.finish(tally)),
                _ => None,
            }
        } else if running.catching_up.is_none() {
            let sum = running.current.finish(&running.circle);
            if let Some(sum) = &sum {
                let next = running.next.take();
                running.current = next.unwrap_or_else(|| Exchange::new(sum.step + 1, &running.circle));
            }
            sum
        } else {
            None
        };
        let Some(sum) = sum else { return };
        let epoch = running.formation.epoch;
        let hash = *blake3::hash(&sum.values).as_bytes();
        effects.push(MemberEffect::Report(Report::Applied { epoch, step: sum.step, hash }));
        self.position = Some(sum.step + 1);
        self.last = Some(sum);
        self.stop_if_due(effects);
    }

    /// Answers the trainer when it can be.
    fn answer(&mut self, effects: &mut Vec<MemberEffect>) {
        let (Some(asked), Some(position)) = (&self.asked, self.position) else { return };
        let answer = match asked {
            // The sum of an update that it lacks is there: an empty run leads straight to it.
            Asked::Begin { applied } if *applied < position => {
                Some(Answer::Deal(self.deal(self.epoch, *applied, 0..0)))
            }
            Asked::Begin { .. } => match &self.running {
                None => None,
                Some(Running { catching_up: Some(CatchingUp::State { arrived: true }), .. }) => {
                    Some(Answer::Load)
                }
                Some(Running { catching_up: Some(_), .. }) => None,
                Some(Running { owes_state: true, .. }) => Some(Answer::Save),
                Some(running) => Some(Answer::Deal(self.my_deal(running, position))),
            },
            Asked::Reduce(deal) if deal.step < position => Some(match &self.last {
                Some(last) if last.step == deal.step => Answer::Sum(last.clone()),
                _ => Answer::Begin,
            }),
            Asked::Reduce(deal) => match &self.running {
                None | Some(Running { catching_up: Some(CatchingUp::Sum { .. }), .. }) => None,
                Some(running) if running.catching_up.is_some() || running.owes_state => Some(Answer::Begin),
                Some(running) if running.formation.epoch == deal.epoch => None,
                Some(running) => Some(Answer::Redeal(self.my_deal(running, position))),
            },
        };
        let Some(answer) = answer else { return };
        match (&answer, &mut self.running) {
            (Answer::Save, Some(running)) => {
                running.owes_state = false;
                self.saving = true;
            }
            // From here on it counts as loaded, as a sum that was handed out counts as applied.
            (Answer::Load, Some(running)) => {
                running.catching_up = None;
                self.position = Some(running.formation.step);
                self.last = None;
            }
            _ => {}
        }
        self.asked = None;
        effects.push(MemberEffect::Answer(answer));
    }

    fn my_deal(&self, running: &Running, step: u64) -> Deal {
        let circle = &running.circle;
        self.deal(running.formation.epoch, step, circle.runs[circle.me].clone())
    }

    fn deal(&self, epoch: u64, step: u64, run: std::ops::Range<u32>) -> Deal {
        Deal { epoch, step, micro_batches: self.micro_batches, run }
    }
}

impl Frame {
    /// The step that it belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Part { step, .. }
            | Self::Tally { step, .. }
            | Self::Idle { step }
            | Self::Sum { step, .. } => *step,
        }
    }
}

/// A piece that was added up here, to all others.
fn pass_on(circle: &Circle, step: u64, piece: &Piece, effects: &mut Vec<MemberEffect>) {
    for (place, &to) in circle.members.iter().enumerate() {
        if place != circle.me {
            let frame = Frame::Sum { step, offset: piece.0.start, values: piece.1.clone() };
            effects.push(MemberEffect::Send { to, frame });
        }
    }
}

/// A whole sum, to one who lacks it.
fn send_sum(circle: &Circle, to: MemberId, sum: &Sum, effects: &mut Vec<MemberEffect>) {
    let node = TreeNode { start: 0, end: circle.micro_batches };
    let tally = Frame::Tally { step: sum.step, node, tally: sum.tally };
    effects.push(MemberEffect::Send { to, frame: tally });
    for piece in (0..circle.members.len()).flat_map(|place| circle.slices.chunks(place)) {
        let values = sum.values.slice(piece.start * 4..piece.end * 4);
        let frame = Frame::Sum { step: sum.step, offset: piece.start, values };
        effects.push(MemberEffect::Send { to, frame });
    }
}

/// A frame of the sum that this member lacks.
fn take_sum(
    circle: &Circle,
    gather: &mut Gather,
    whole: &mut Option<Tally>,
    frame: Frame,
) -> Result<(), FrameError> {
    let root = TreeNode { start: 0, end: circle.micro_batches };
    match frame {
        Frame::Sum { offset, values, .. } => {
            let piece = circle.piece(None, offset, &values)?;
            if !gather.accept(&piece, &values) {
                return Err(FrameError::Again { node: root, offset });
            }
        }
        Frame::Tally { node, tally, .. } if node == root => *whole = Some(tally),
        Frame::Tally { node, .. } | Frame::Part { node, .. } => return Err(FrameError::Node(node)),
        Frame::Idle { .. } => return Err(FrameError::Idle),
    }
    Ok(())
}
