//! A line of stages within a process: a thread for each, channels with little room between them.

use super::*;
use mlxnode_compute::{
    Activation, Advance, Job as _, JobError, LinkError, Reduce, StageLink, StageOrder, Way,
};
use mlxnode_training::{FineTuning, PrepareError, Sets, StagedFineTuning};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// A line that is not through by then hangs.
const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(2);

enum Item {
    Order(StageOrder),
    Numbers(Vec<f64>),
    All(Vec<Vec<f64>>),
    File(String, Vec<u8>),
    Hidden(u64, Activation),
}

struct Lane {
    to: SyncSender<Item>,
    from: Receiver<Item>,
}

fn lanes(room: usize) -> (Lane, Lane) {
    let ((a, b), (c, d)) = (sync_channel(room), sync_channel(room));
    (Lane { to: a, from: d }, Lane { to: c, from: b })
}

/// When a stage fails: at this call of its link, counted from 0.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub stage: usize,
    pub call: usize,
}

struct Shared {
    over: AtomicBool,
    fault: Option<Fault>,
    /// Calls of each stage.
    calls: Vec<AtomicUsize>,
}

struct ThreadLink {
    stage: usize,
    stages: usize,
    folder: PathBuf,
    shared: Arc<Shared>,
    previous: Option<Lane>,
    next: Option<Lane>,
    /// To all others on stage 0, else to that.
    lead: Vec<Lane>,
}

impl Drop for ThreadLink {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
    }
}

impl Shared {
    fn over() -> LinkError {
        LinkError::Over("a stage is lost".to_owned())
    }

    fn call(&self, stage: usize) -> Result<(), LinkError> {
        let call = self.calls[stage].fetch_add(1, Ordering::SeqCst);
        if self.fault.is_some_and(|fault| fault.stage == stage && fault.call == call) {
            self.over.store(true, Ordering::SeqCst);
        }
        match self.over.load(Ordering::SeqCst) && self.fault.is_some_and(|fault| fault.stage == stage) {
            true => Err(Self::over()),
            false => Ok(()),
        }
    }

    fn put(&self, lane: &Lane, item: Item) -> Result<(), LinkError> {
        let (begun, mut item) = (Instant::now(), item);
        loop {
            match lane.to.try_send(item) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(Self::over()),
                Err(TrySendError::Full(back)) => item = back,
            }
            if self.over.load(Ordering::SeqCst) {
                return Err(Self::over());
            }
            assert!(begun.elapsed() < PATIENCE, "a stage waits for ever to send");
            std::thread::sleep(POLL);
        }
    }

    fn get(&self, lane: &Lane) -> Result<Item, LinkError> {
        let begun = Instant::now();
        loop {
            match lane.from.recv_timeout(POLL) {
                Ok(item) => return Ok(item),
                Err(RecvTimeoutError::Disconnected) => return Err(Self::over()),
                Err(RecvTimeoutError::Timeout) if self.over.load(Ordering::SeqCst) => {
                    return Err(Self::over());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            assert!(begun.elapsed() < PATIENCE, "a stage waits for ever to receive");
        }
    }
}

fn strange() -> LinkError {
    LinkError::OutOfStep("something else was due".to_owned())
}

impl StageLink for ThreadLink {
    fn stage(&self) -> usize {
        self.stage
    }

    fn stages(&self) -> usize {
        self.stages
    }

    fn lead(&mut self, order: &StageOrder) -> Result<(), LinkError> {
        self.shared.call(self.stage)?;
        self.lead.iter().try_for_each(|lane| self.shared.put(lane, Item::Order(order.clone())))
    }

    fn follow(&mut self) -> Result<StageOrder, LinkError> {
        self.shared.call(self.stage)?;
        match self.shared.get(&self.lead[0])? {
            Item::Order(order) => Ok(order),
            _ => Err(strange()),
        }
    }

    fn send(&mut self, way: Way, micro_batch: u64, activation: Activation) -> Result<(), LinkError> {
        self.shared.call(self.stage)?;
        let lane = if way == Way::Forward { &self.next } else { &self.previous };
        self.shared.put(lane.as_ref().ok_or_else(strange)?, Item::Hidden(micro_batch, activation))
    }

    fn receive(&mut self, way: Way, micro_batch: u64) -> Result<Activation, LinkError> {
        self.shared.call(self.stage)?;
        let lane = if way == Way::Forward { &self.previous } else { &self.next };
        match self.shared.get(lane.as_ref().ok_or_else(strange)?)? {
            Item::Hidden(number, activation) if number == micro_batch => Ok(activation),
            _ => Err(strange()),
        }
    }

    fn exchange(&mut self, numbers: &[f64]) -> Result<Vec<Vec<f64>>, LinkError> {
        self.shared.call(self.stage)?;
        assert!(numbers.len() <= 1024);
        if self.stage > 0 {
            self.shared.put(&self.lead[0], Item::Numbers(numbers.to_vec()))?;
            return match self.shared.get(&self.lead[0])? {
                Item::All(all) => Ok(all),
                _ => Err(strange()),
            };
        }
        let mut all = vec![numbers.to_vec()];
        for lane in &self.lead {
            match self.shared.get(lane)? {
                Item::Numbers(numbers) => all.push(numbers),
                _ => return Err(strange()),
            }
        }
        self.lead.iter().try_for_each(|lane| self.shared.put(lane, Item::All(all.clone())))?;
        Ok(all)
    }

    fn gather(&mut self, file: &Path) -> Result<Vec<PathBuf>, LinkError> {
        self.shared.call(self.stage)?;
        if self.stage > 0 {
            self.shared.put(&self.lead[0], sent(file))?;
            return Ok(Vec::new());
        }
        let mut all = vec![file.to_owned()];
        for (number, lane) in self.lead.iter().enumerate() {
            all.push(taken(&self.shared.get(lane)?, &self.folder.join(format!("gathered-{number}")))?);
        }
        Ok(all)
    }

    fn scatter(&mut self, file: Option<&Path>) -> Result<PathBuf, LinkError> {
        self.shared.call(self.stage)?;
        match file {
            Some(file) if self.stage == 0 => {
                self.lead.iter().try_for_each(|lane| self.shared.put(lane, sent(file)))?;
                Ok(file.to_owned())
            }
            _ => taken(&self.shared.get(&self.lead[0])?, &self.folder.join("scattered")),
        }
    }
}

fn sent(file: &Path) -> Item {
    let name = file.file_name().unwrap().to_string_lossy().into_owned();
    Item::File(name, std::fs::read(file).unwrap())
}

fn taken(item: &Item, folder: &Path) -> Result<PathBuf, LinkError> {
    let Item::File(name, bytes) = item else { return Err(strange()) };
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join(name), bytes).unwrap();
    Ok(folder.join(name))
}

/// How a job is made on each stage.
pub struct Plan<'a> {
    pub model: &'a Path,
    pub yaml: &'a str,
    pub sets: fn() -> Sets,
    pub compile: bool,
}

impl Plan<'_> {
    /// The same in one process.
    pub fn alone(&self) -> FineTuning {
        let tuning = tuning(self.model);
        FineTuning::new(tuning, training(self.yaml), (self.sets)(), [7; 32], self.compile).unwrap()
    }

    /// A line with these layers, each stage on a thread of its own: stage 0 does what `lead` says, the others follow. What became of each,
    /// and how many calls of its link each made.
    pub fn line<T: Send + 'static>(
        &self,
        layers: &[Range<usize>],
        fault: Option<Fault>,
        differs: impl Fn(usize, &mut Made) + Clone + Send + 'static,
        lead: impl FnOnce(&mut StagedFineTuning) -> Result<T, JobError> + Send + 'static,
    ) -> Line<T> {
        let folder = tempfile::tempdir().unwrap();
        let stages = layers.len();
        let calls = (0..stages).map(|_| AtomicUsize::new(0)).collect();
        let shared = Arc::new(Shared { over: AtomicBool::new(false), fault, calls });
        let mut links: Vec<ThreadLink> = (0..stages)
            .map(|stage| ThreadLink {
                stage,
                stages,
                folder: folder.path().join(format!("link-{stage}")),
                shared: Arc::clone(&shared),
                previous: None,
                next: None,
                lead: Vec::new(),
            })
            .collect();
        for stage in 1..stages {
            // Room for one micro-batch on the way.
            let (down, up) = lanes(1);
            (links[stage - 1].next, links[stage].previous) = (Some(down), Some(up));
            let (here, there) = lanes(2);
            links[0].lead.push(here);
            links[stage].lead.push(there);
        }
        let (done, ended) = sync_channel(stages);
        let mut lead = Some(lead);
        let mut threads = Vec::new();
        for (stage, link) in links.into_iter().enumerate() {
            let made = Made {
                model: self.model.to_owned(),
                yaml: self.yaml.to_owned(),
                sets: self.sets,
                fingerprint: [7; 32],
                layers: layers[stage].clone(),
                group: None,
            };
            let (compile, done, differs) = (self.compile, done.clone(), differs.clone());
            let (own, lead) =
                (folder.path().join(format!("stage-{stage}")), if stage == 0 { lead.take() } else { None });
            threads.push(std::thread::spawn(move || {
                let mut made = made;
                differs(stage, &mut made);
                let ended = (|| {
                    let mut job = made.job(Box::new(link), compile, &own).map_err(Ended::NotBegun)?;
                    match lead {
                        Some(lead) => lead(&mut job).map(Some).map_err(Ended::Failed),
                        None => follow(&mut job).map(|()| None).map_err(Ended::Failed),
                    }
                })();
                let _ = done.send(stage);
                ended
            }));
        }
        for _ in 0..stages {
            ended.recv_timeout(PATIENCE).expect("a stage does not end");
        }
        let ended = threads.into_iter().map(|thread| thread.join().expect("a stage panicked")).collect();
        let calls = shared.calls.iter().map(|calls| calls.load(Ordering::SeqCst)).collect();
        Line { ended, calls }
    }
}

fn follow(job: &mut StagedFineTuning) -> Result<(), JobError> {
    while job.advance()? != Advance::Finished {}
    Ok(())
}

/// What a stage is made of; a test may change it on one of them.
pub struct Made {
    pub model: PathBuf,
    pub yaml: String,
    pub sets: fn() -> Sets,
    pub fingerprint: [u8; 32],
    pub layers: Range<usize>,
    /// The same stage of other lines.
    pub group: Option<Box<dyn Reduce>>,
}

impl Made {
    fn job(
        self,
        link: Box<dyn StageLink>,
        compile: bool,
        folder: &Path,
    ) -> Result<StagedFineTuning, PrepareError> {
        let checkpoint = Checkpoint::open(&self.model).unwrap();
        let layers = LayerRange::new(self.layers.start, self.layers.end);
        let tuning = Tuning::load(&checkpoint, layers, &mut |_, _| {}).unwrap();
        let config = training(&self.yaml);
        let (sets, group) = ((self.sets)(), self.group);
        let job = StagedFineTuning::new(tuning, config, sets, self.fingerprint, compile, link, folder)?;
        match group {
            Some(group) => job.with_replicas(group),
            None => Ok(job),
        }
    }
}

#[derive(Debug)]
pub enum Ended {
    NotBegun(PrepareError),
    Failed(JobError),
}

pub struct Line<T> {
    /// What stage 0 made of it, and nothing for the others.
    pub ended: Vec<Result<Option<T>, Ended>>,
    pub calls: Vec<usize>,
}

impl<T> Line<T> {
    /// All went well.
    pub fn lead(self) -> T {
        let mut first = None;
        for (stage, ended) in self.ended.into_iter().enumerate() {
            match ended {
                Ok(made) => first = first.or(made),
                Err(error) => panic!("stage {stage}: {error:?}"),
            }
        }
        first.unwrap()
    }

    /// What stage 0 made of it, which left the others before the end.
    pub fn left(self) -> T {
        self.ended.into_iter().next().unwrap().unwrap().unwrap()
    }

    /// What each stage says is wrong.
    pub fn words(&self) -> Vec<String> {
        let of = |ended: &Result<Option<T>, Ended>| match ended {
            Ok(_) => String::new(),
            Err(Ended::NotBegun(error)) => error.to_string(),
            Err(Ended::Failed(error)) => error.to_string(),
        };
        self.ended.iter().map(of).collect()
    }
}
