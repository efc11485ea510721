//! Workers and stages of a job on this node while another one leads it: the leading node asks for them (`help_client`), and is told what becomes of
//! them.
//!
//! ```text
//! leading node: Asked ◀── where it listens; that its node stops; how it ended ── Helper :this node
//!                 └── dropped: it is not wanted any more ────────────────────────▶
//! ```

use mlxnode_cluster::KeyPin;
use mlxnode_coordinator::Error;
use std::net::SocketAddr;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// What a node that helps tells the leading one.
pub(crate) enum Helped {
    /// Where its worker listens.
    Joined(Joined),
    /// The node stops.
    Leaves,
}

/// Where a worker listens, and the keys of its listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joined {
    /// For the other workers, or for the other stages of its line.
    pub(crate) at: (SocketAddr, KeyPin),
    /// For the same stage of other lines, where there are some.
    pub(crate) exchange: Option<(SocketAddr, KeyPin)>,
}

/// A worker of a job that another node leads. Dropping it ends it.
pub(crate) struct Helper {
    joined: Option<oneshot::Receiver<Joined>>,
    /// Cancelled when its node stops; until that is said.
    leaving: Option<CancellationToken>,
    task: AbortOnDropHandle<Result<(), Error>>,
}

impl Helper {
    /// Begins it. `leaving` is cancelled when its node stops.
    pub(super) fn start<F>(
        leaving: CancellationToken,
        work: impl FnOnce(oneshot::Sender<Joined>) -> F,
    ) -> Self
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (sender, joined) = oneshot::channel();
        let task = AbortOnDropHandle::new(tokio::spawn(work(sender)));
        Self { joined: Some(joined), leaving: Some(leaving), task }
    }

    /// What there is to say next: where its worker listens, that its node stops; then `None` when it has ended.
    ///
    /// # Errors
    /// Why it ended.
    pub(crate) async fn next(&mut self) -> Result<Option<Helped>, Error> {
        let Self { joined, leaving, task } = self;
        if let (Some(wait), Some(stops)) = (joined.as_mut(), leaving.as_ref()) {
            tokio::select! {
                told = wait => {
                    *joined = None;
                    if let Ok(joined) = told {
                        return Ok(Some(Helped::Joined(joined)));
                    }
                }
                () = stops.cancelled() => {
                    (*joined, *leaving) = (None, None);
                    return Ok(Some(Helped::Leaves));
                }
            }
        }
        if let Some(stops) = leaving.take() {
            tokio::select! {
                ended = &mut *task => return over(ended),
                () = stops.cancelled() => return Ok(Some(Helped::Leaves)),
            }
        }
        over(task.await)
    }
}

fn over(ended: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<Option<Helped>, Error> {
    ended.unwrap_or_else(|error| Err(Error::Failed(error.to_string()))).map(|()| None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[tokio::test]
    async fn a_helper_says_where_it_is_that_its_node_stops_and_how_it_ended() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 7));
        let there = Joined { at: (address, KeyPin::from_bytes([1; 32])), exchange: None };
        let leaving = CancellationToken::new();
        let (go, wait) = oneshot::channel::<()>();
        let mut helper = Helper::start(leaving.clone(), |joined| async move {
            let _ = joined.send(there);
            let _ = wait.await;
            Err(Error::Unavailable("gone".into()))
        });
        assert!(matches!(helper.next().await, Ok(Some(Helped::Joined(joined))) if joined == there));
        leaving.cancel();
        assert!(matches!(helper.next().await, Ok(Some(Helped::Leaves))));
        drop(go);
        assert!(matches!(helper.next().await, Err(Error::Unavailable(text)) if text == "gone"));

        // Before there is a worker.
        let leaving = CancellationToken::new();
        leaving.cancel();
        let mut helper = Helper::start(leaving, |joined| async move {
            let _never = joined;
            std::future::pending().await
        });
        assert!(matches!(helper.next().await, Ok(Some(Helped::Leaves))));

        // One whose task ends before it is there.
        let mut helper = Helper::start(CancellationToken::new(), |joined| async move {
            drop(joined);
            Err(Error::Invalid("no such stage".into()))
        });
        assert!(matches!(helper.next().await, Err(Error::Invalid(_))));
    }
}
