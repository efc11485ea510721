//! What all parts of a worker hold on to: the first fault ends them together.

use crate::error::Fault;
use std::sync::{Arc, OnceLock};
use tokio_util::sync::CancellationToken;

/// Ends the worker once, with one reason. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lifeline {
    ended: CancellationToken,
    fault: Arc<OnceLock<Fault>>,
}

impl Lifeline {
    /// Ends the worker because of `fault`, unless it is ending already.
    pub(crate) fn fail(&self, fault: Fault) {
        if !self.ended.is_cancelled() {
            let _ = self.fault.set(fault); // the first one is the cause, later ones follow from it
        }
        self.ended.cancel();
    }

    /// Ends the worker as it was asked to.
    pub(crate) fn finish(&self) {
        self.ended.cancel();
    }

    /// Why it ended, unless it was asked to.
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault.get().cloned()
    }

    /// Why it ended, for whoever still listens.
    pub(crate) fn last_words(&self) -> String {
        self.fault().map_or_else(|| "the worker was stopped".to_owned(), |fault| fault.to_string())
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.ended.is_cancelled()
    }

    pub(crate) fn token(&self) -> &CancellationToken {
        &self.ended
    }
}
