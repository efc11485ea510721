//! What the rounds tell the members: who they are now, and from which step they go on.

/// One worker in a job, never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct MemberId(pub u64);

impl std::fmt::Display for MemberId {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}", self.0)
    }
}

/// A group that computes from `step` on until the next formation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Formation {
    /// Counts the formations of a job, from 1.
    pub epoch: u64,
    /// Updates that every member has made once it has caught up.
    pub step: u64,
    /// In the order that decides runs and slices.
    pub members: Vec<Order>,
}

/// A member of a formation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Who.
    pub member: MemberId,
    /// What it needs first.
    pub catch_up: CatchUp,
}

/// How a member gets to the formation's step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CatchUp {
    /// It is there.
    Nothing,
    /// It lacks the last update: gets its sum from this one, and applies it.
    Sum(MemberId),
    /// It takes over the whole state of this one.
    State(MemberId),
}

impl Formation {
    /// Where `member` stands in the order.
    pub fn place(&self, member: MemberId) -> Option<usize> {
        self.members.iter().position(|order| order.member == member)
    }

    /// Who gets the sum of the last update from `source`.
    pub(crate) fn sums_from(&self, source: MemberId) -> impl Iterator<Item = MemberId> + '_ {
        let wanted = CatchUp::Sum(source);
        self.members.iter().filter(move |order| order.catch_up == wanted).map(|order| order.member)
    }

    /// Does anybody take over the state of `source`?
    pub(crate) fn needs_state_of(&self, source: MemberId) -> bool {
        self.members.iter().any(|order| order.catch_up == CatchUp::State(source))
    }
}
