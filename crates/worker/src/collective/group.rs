//! What the trainer of a worker calls: waits for the answers that the member gives.

use super::shared::Shared;
use super::state_files;
use mlxnode_collective::{Answer, Member, MemberEffect, Report};
use mlxnode_compute::{Deal, Partial, Reduce, ReduceError, Reduced, Turn};
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

/// A trainer's way to its group. Dropping it leaves the group.
pub struct Group {
    shared: Arc<Shared>,
    /// States written for others so far: each has a folder of its own.
    saved: u64,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Group").field("member", &self.shared.me).finish_non_exhaustive()
    }
}

impl Group {
    /// A trainer whose gradient has `values` numbers, in steps of `micro_batches`.
    pub(super) fn new(shared: Arc<Shared>, values: usize, micro_batches: u32) -> Self {
        shared.inner().member = Some(Member::new(shared.me, values, micro_batches));
        Self { shared, saved: 0 }
    }

    fn ask(&self, question: impl FnOnce(&mut Member) -> Vec<MemberEffect>) -> Result<Answer, ReduceError> {
        let patience = self.shared.options.patience;
        let until = Instant::now() + patience;
        let mut inner = self.shared.inner();
        if let Some(reason) = &inner.left {
            return Err(ReduceError::Left(reason.clone()));
        }
        inner.answer = None;
        if let Some(member) = &mut inner.member {
            let effects = question(member);
            self.shared.carry_out(&mut inner, effects);
        }
        loop {
            if let Some(answer) = inner.answer.take() {
                return match answer {
                    Answer::OutOfStep(reason) => Err(ReduceError::OutOfStep(reason)),
                    answer => Ok(answer),
                };
            }
            if let Some(reason) = &inner.left {
                return Err(ReduceError::Left(reason.clone()));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let waiting_for = inner.member.as_ref().map(Member::waiting_for).unwrap_or_default();
                return Err(ReduceError::TimedOut { seconds: patience.as_secs(), waiting_for });
            }
            let waited = self.shared.waited.during(|| self.shared.answered.wait_timeout(inner, left));
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Reduce for Group {
    fn begin(&mut self, applied: u64) -> Result<Turn, ReduceError> {
        match self.ask(|member| member.begin(applied))? {
            Answer::Deal(deal) => Ok(Turn::Deal(deal)),
            Answer::Save => {
                // Whoever still reads the one before finds it gone, and not another in its place.
                let of = |number: u64| self.shared.options.folder.join(format!("state-to-give-{number}"));
                gone(&of(self.saved))?;
                self.saved += 1;
                let folder = of(self.saved);
                fresh(&folder)?;
                self.shared.inner().saving = Some(folder.clone());
                Ok(Turn::Save(folder))
            }
            Answer::Load => {
                let folder = self.shared.inner().fetched.clone();
                folder.map(Turn::Load).ok_or_else(|| unexpected("a state that did not arrive"))
            }
            _ => Err(unexpected("a sum before a deal")),
        }
    }

    fn is_over(&self, deal: &Deal) -> bool {
        let inner = self.shared.inner();
        inner.left.is_some() || inner.member.as_ref().is_none_or(|member| member.is_over(deal))
    }

    fn reduce(&mut self, deal: &Deal, partials: Vec<Partial>) -> Result<Reduced, ReduceError> {
        match self.ask(|member| member.reduce(deal.clone(), &partials))? {
            Answer::Sum(sum) => Ok(Reduced::Sum(sum)),
            Answer::Redeal(deal) => Ok(Reduced::Redeal(deal)),
            Answer::Begin => Ok(Reduced::Begin),
            _ => Err(unexpected("a turn instead of a sum")),
        }
    }

    fn applied(&mut self, updates: u64, parameters: [u8; 32]) {
        let report = Report::Parameters { updates, hash: parameters };
        if !self.shared.reports.push(report) {
            self.shared.leave("the node does not read what is reported");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.shared.leave("the trainer has ended");
    }
}

fn unexpected(what: &str) -> ReduceError {
    ReduceError::OutOfStep(format!("the group answered with {what}"))
}

/// Removes the folder, if it is there.
fn gone(folder: &Path) -> Result<(), ReduceError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(ReduceError::Left(format!("cannot remove {}: {error}", folder.display())))
        }
        _ => Ok(()),
    }
}

/// Makes the folder, empty.
fn fresh(folder: &Path) -> Result<(), ReduceError> {
    state_files::fresh(folder).map_err(|error| {
        ReduceError::Left(format!("cannot make {} for its state: {error}", folder.display()))
    })
}
