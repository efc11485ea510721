//! What can go wrong with an order, for whoever gave it.

/// Why an order was not carried out. Each variant is one answer of the API (the status code in brackets); the text is for the person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The order makes no sense as it stands (INVALID_ARGUMENT).
    #[error("{0}")]
    Invalid(String),
    /// There is no such model, file or deployment (NOT_FOUND).
    #[error("{0}")]
    NotFound(String),
    /// The name belongs to another model (ALREADY_EXISTS).
    #[error(
        "the name {name:?} is taken by {source_of_other}; unload that first, or give this one another name"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// What it is loaded from.
        source_of_other: String,
    },
    /// Not enough memory; the text has the numbers and what would fit (FAILED_PRECONDITION).
    #[error("{0}")]
    DoesNotFit(String),
    /// The model or the state of the cluster does not allow it (FAILED_PRECONDITION).
    #[error("{0}")]
    Refused(String),
    /// A node or a worker is not there (any more) or does not answer (UNAVAILABLE).
    #[error("{0}")]
    Unavailable(String),
    /// It took longer than it may (DEADLINE_EXCEEDED).
    #[error("{0}")]
    TimedOut(String),
    /// Too much at once (RESOURCE_EXHAUSTED).
    #[error("{0}")]
    TooMany(String),
    /// Whoever asked took it back (CANCELLED).
    #[error("{0}")]
    Cancelled(String),
    /// A worker or the control log failed (INTERNAL).
    #[error("{0}")]
    Failed(String),
}

impl From<crate::placement::Refusal> for Error {
    fn from(refusal: crate::placement::Refusal) -> Self {
        use crate::placement::Refusal;
        let text = refusal.to_string();
        match refusal {
            Refusal::DoesNotFit(_) => Self::DoesNotFit(text),
            Refusal::NoNodes => Self::Unavailable(text),
            Refusal::NoLayers | Refusal::NotEnoughNodes { .. } => Self::Refused(text),
            Refusal::UnknownNode { .. } => Self::NotFound(text),
            Refusal::AmbiguousNode { .. }
            | Refusal::Stages { .. }
            | Refusal::Context { .. }
            | Refusal::Sequences { .. } => Self::Invalid(text),
        }
    }
}
