//! A fine-tuning's configuration and rows, looked through before it is submitted. What they mean, [`JobReader`] knows: the crates on the
//! network's side do not know the trainer.

use super::peer_client::{Peers, on_disk};
use mlxnode_api::jobs::{Examined, InputFile, Unfit};
use mlxnode_coordinator::Error;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Knows what a fine-tuning would read.
pub trait JobReader: Send + Sync + std::fmt::Debug + 'static {
    /// Reads the configuration, and the files in `folder` as it would find them. May take as long as reading them does.
    ///
    /// # Errors
    /// [`Unfit::Configuration`], [`Unfit::Rows`]: texts without the folder.
    fn examine(&self, configuration: &str, model: &str, folder: &Path) -> Result<Examined, Unfit>;
}

/// Files are looked through one after the other: that takes a processor and a disk.
const AT_ONCE: usize = 1;

/// Looks through files of this node. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Checker {
    reader: Option<Arc<dyn JobReader>>,
    turns: Arc<Semaphore>,
}

impl Checker {
    pub(crate) fn new(reader: Option<Arc<dyn JobReader>>) -> Self {
        Self { reader, turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    pub(super) async fn check(
        &self,
        peers: &Peers,
        configuration: String,
        model: String,
        inputs: Vec<InputFile>,
    ) -> Result<Examined, Unfit> {
        let reader = self.reader.clone();
        let reader =
            reader.ok_or_else(|| Unfit::NotHere("this node cannot look into files of jobs".into()))?;
        for input in &inputs {
            mlxnode_coordinator::jobs::check_file_name(&input.name).map_err(Unfit::Failed)?;
            match peers.fetch_input(input).await {
                Ok(()) => {}
                Err(Error::Unavailable(text)) => return Err(Unfit::NotHere(text)),
                Err(error) => return Err(Unfit::Failed(error)),
            }
        }
        let stopping = |_| Unfit::Failed(Error::Unavailable("this node stops".into()));
        let _turn = self.turns.acquire().await.map_err(stopping)?;
        let store = peers.store.clone();
        let examined = on_disk("looking into files", move || {
            let named: Vec<_> = inputs.into_iter().map(|input| (input.name, input.hash)).collect();
            let folder = store.lay_out_to_check(&named)?;
            Ok(reader.examine(&configuration, &model, &folder.0))
        });
        examined.await.map_err(Unfit::Failed)?
    }
}
