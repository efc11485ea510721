//! What the trainer of a stage calls and blocks on.

use super::files::{FileReader, FileWriter};
use super::lanes::Lane;
use super::shared::{Lanes, Shared};
use super::wire::{Item, MOST_NUMBERS};
use mlxnode_compute::{Activation, LinkError, StageLink, StageOrder, Way};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// A trainer's way to the other stages. Dropping it ends the line.
pub struct LineLink {
    shared: Arc<Shared>,
    /// Once the line is formed.
    lanes: Option<Lanes>,
}

impl std::fmt::Debug for LineLink {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (stage, stages) = (self.shared.stage, self.shared.stages);
        out.debug_struct("LineLink").field("stage", &stage).field("stages", &stages).finish_non_exhaustive()
    }
}

impl Drop for LineLink {
    fn drop(&mut self) {
        self.shared.over.now("the trainer has ended");
    }
}

impl Shared {
    fn is_over(&self) -> LinkError {
        LinkError::Over(self.over.why())
    }

    /// Has the other stages hear that this one does not go on.
    fn broken(&self, error: LinkError) -> LinkError {
        self.over.now(format!("stage {}: {error}", self.stage));
        error
    }

    /// Blocks on `work`, which concerns stage `peer`; `None`: the lane is closed.
    fn wait<T>(
        &self,
        peer: usize,
        is_patient: bool,
        work: impl Future<Output = Option<T>>,
    ) -> Result<T, LinkError> {
        let patience = self.options.patience;
        let until = (!is_patient).then(|| Instant::now() + patience);
        let work = async {
            tokio::select! {
                biased;
                () = self.over.token().cancelled() => None,
                done = work => done,
            }
        };
        match self.waited.during(|| block_until(until, work)) {
            Some(Some(done)) => Ok(done),
            Some(None) => Err(self.is_over()),
            None => Err(self.broken(LinkError::TimedOut { stage: peer, seconds: patience.as_secs() })),
        }
    }

    fn put(&self, lane: &Lane, item: Item) -> Result<(), LinkError> {
        self.wait(lane.peer, false, async { lane.outgoing.send(item).await.ok() })
    }

    fn get(&self, lane: &mut Lane) -> Result<Item, LinkError> {
        self.wait(lane.peer, false, lane.incoming.recv())
    }

    fn out_of_step(&self, why: String) -> LinkError {
        self.broken(LinkError::OutOfStep(why))
    }

    fn unexpected(&self, lane: &Lane, item: &Item, due: &str) -> LinkError {
        let what = match item {
            Item::Activation { micro_batch, .. } => format!("hidden vectors of micro-batch {micro_batch}"),
            Item::Order(_) => "an order".to_owned(),
            Item::Numbers(_) | Item::NumbersOfAll(_) => "numbers".to_owned(),
            Item::File { .. } | Item::Piece(_) | Item::Hash(_) => "a file".to_owned(),
            Item::Receipt => "a receipt".to_owned(),
        };
        self.out_of_step(format!("stage {} gives {what} where {due} were due", lane.peer))
    }

    /// Sends a file along all `lanes`, side by side.
    fn give(&self, lanes: &[Lane], file: &Path) -> Result<(), LinkError> {
        let mut reader = FileReader::open(file).map_err(|error| self.broken(error))?;
        while let Some(item) = reader.next().map_err(|error| self.broken(error))? {
            for lane in lanes {
                self.put(lane, item.clone())?;
            }
        }
        Ok(())
    }

    /// Takes a file in.
    fn take(&self, lane: &mut Lane, folder: &Path) -> Result<PathBuf, LinkError> {
        let mut writer = match self.get(lane)? {
            Item::File { name, .. } => {
                FileWriter::create(folder, &name).map_err(|error| self.broken(error))?
            }
            other => return Err(self.unexpected(lane, &other, "a file's bytes")),
        };
        // How many pieces come, the lane's other end of this process has checked.
        loop {
            match self.get(lane)? {
                Item::Piece(piece) => writer.write(&piece).map_err(|error| self.broken(error))?,
                Item::Hash(hash) => return writer.finish(hash).map_err(|error| self.broken(error)),
                other => return Err(self.unexpected(lane, &other, "a file's bytes")),
            }
        }
    }
}

impl LineLink {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, lanes: None }
    }

    /// All lanes, once they are open: as soon as the node has said where the other stages are, and these are there.
    fn lanes(&mut self) -> Result<(&Shared, &mut Lanes), LinkError> {
        let Self { shared, lanes } = self;
        if lanes.is_none() {
            let formed = async {
                shared.formed().await;
                shared.take_lanes()
            };
            // As long as the node of the first stage holds on: another one may have to fetch the model before.
            *lanes = Some(shared.wait(usize::from(shared.stage == 0), true, formed)?);
        }
        match lanes {
            // Also when what is asked for would need no answer.
            Some(_) if shared.over.token().is_cancelled() => Err(shared.is_over()),
            Some(lanes) => Ok((shared, lanes)),
            None => Err(shared.is_over()),
        }
    }

    /// Where the files of the present call go; those of the call before go away.
    fn folder(&self, what: &str) -> Result<PathBuf, LinkError> {
        let folder = &self.shared.options.folder;
        crate::collective::state_files::fresh(folder)
            .map_err(|error| LinkError::File(format!("{}: {error}", folder.display())))?;
        Ok(folder.join(what))
    }
}

/// Wakes a thread that is parked.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Blocks this thread on channels that a runtime on another thread fills, which may end meanwhile: so without a timer of that runtime. `None`:
/// not until then.
fn block_until<T>(until: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut work = pin!(work);
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut context) {
            return Some(done);
        }
        match until.map(|until| until.saturating_duration_since(Instant::now())) {
            None => std::thread::park(),
            Some(Duration::ZERO) => return None,
            Some(left) => std::thread::park_timeout(left),
        }
    }
}

impl StageLink for LineLink {
    fn stage(&self) -> usize {
        self.shared.stage
    }

    fn stages(&self) -> usize {
        self.shared.stages
    }

    fn lead(&mut self, order: &StageOrder) -> Result<(), LinkError> {
        let (shared, lanes) = self.lanes()?;
        if shared.stage != 0 {
            return Err(shared.out_of_step(format!("stage {} wants to lead", shared.stage)));
        }
        lanes.lead.iter().try_for_each(|lane| shared.put(lane, Item::Order(order.clone())))
    }

    fn follow(&mut self) -> Result<StageOrder, LinkError> {
        let (shared, lanes) = self.lanes()?;
        match &mut lanes.lead[..] {
            [lane] if shared.stage > 0 => match shared.wait(lane.peer, true, lane.incoming.recv())? {
                Item::Order(order) => Ok(order),
                other => Err(shared.unexpected(lane, &other, "orders")),
            },
            _ => Err(shared.out_of_step("stage 0 wants to follow".to_owned())),
        }
    }

    fn send(&mut self, way: Way, micro_batch: u64, activation: Activation) -> Result<(), LinkError> {
        let (shared, lanes) = self.lanes()?;
        let lane = match way {
            Way::Forward => &lanes.next,
            Way::Backward => &lanes.previous,
        };
        let Some(lane) = lane else {
            return Err(shared.out_of_step(format!("stage {} has no neighbour {way:?}", shared.stage)));
        };
        shared.put(lane, Item::Activation { micro_batch, activation })
    }

    fn receive(&mut self, way: Way, micro_batch: u64) -> Result<Activation, LinkError> {
        let (shared, lanes) = self.lanes()?;
        let lane = match way {
            Way::Forward => &mut lanes.previous,
            Way::Backward => &mut lanes.next,
        };
        let Some(lane) = lane else {
            return Err(shared.out_of_step(format!("stage {} has no neighbour {way:?}", shared.stage)));
        };
        match shared.get(lane)? {
            Item::Activation { micro_batch: given, activation } if given == micro_batch => Ok(activation),
            other => {
                Err(shared.unexpected(lane, &other, &format!("hidden vectors of micro-batch {micro_batch}")))
            }
        }
    }

    fn exchange(&mut self, numbers: &[f64]) -> Result<Vec<Vec<f64>>, LinkError> {
        let (shared, lanes) = self.lanes()?;
        if numbers.len() > MOST_NUMBERS {
            return Err(shared.out_of_step(format!(
                "stage {} gives {} numbers, but may give {MOST_NUMBERS}",
                shared.stage,
                numbers.len()
            )));
        }
        if shared.stage == 0 {
            let mut all = vec![numbers.to_vec()];
            for lane in &mut lanes.lead {
                match shared.get(lane)? {
                    Item::Numbers(values) => all.push(values),
                    other => return Err(shared.unexpected(lane, &other, "numbers")),
                }
            }
            for lane in &lanes.lead {
                shared.put(lane, Item::NumbersOfAll(all.clone()))?;
            }
            return Ok(all);
        }
        let Some(lane) = lanes.lead.first_mut() else { return Err(shared.is_over()) };
        shared.put(lane, Item::Numbers(numbers.to_vec()))?;
        match shared.get(lane)? {
            Item::NumbersOfAll(all) if all.len() == shared.stages => Ok(all),
            other => Err(shared.unexpected(lane, &other, "the numbers of all stages")),
        }
    }

    fn gather(&mut self, file: &Path) -> Result<Vec<PathBuf>, LinkError> {
        self.lanes()?;
        let folder = self.folder("gathered").map_err(|error| self.shared.broken(error))?;
        let (shared, lanes) = self.lanes()?;
        if shared.stage == 0 {
            let mut all = vec![file.to_owned()];
            for lane in &mut lanes.lead {
                all.push(shared.take(lane, &folder.join(lane.peer.to_string()))?);
                shared.put(lane, Item::Receipt)?;
            }
            return Ok(all);
        }
        shared.give(&lanes.lead, file)?;
        for lane in &mut lanes.lead {
            match shared.get(lane)? {
                Item::Receipt => {}
                other => return Err(shared.unexpected(lane, &other, "a receipt")),
            }
        }
        Ok(Vec::new())
    }

    fn scatter(&mut self, file: Option<&Path>) -> Result<PathBuf, LinkError> {
        self.lanes()?;
        let folder = self.folder("scattered").map_err(|error| self.shared.broken(error))?;
        let (shared, lanes) = self.lanes()?;
        match (shared.stage, file, &mut lanes.lead[..]) {
            (0, Some(file), lanes) => shared.give(lanes, file).map(|()| file.to_owned()),
            (1.., None, [lane]) => shared.take(lane, &folder),
            (0, ..) => Err(shared.out_of_step("stage 0 has no file to give".to_owned())),
            _ => Err(shared.out_of_step("only stage 0 gives a file to all".to_owned())),
        }
    }
}
