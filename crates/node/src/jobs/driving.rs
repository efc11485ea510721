//! The leading process of a job, piece after piece: between two pieces its attempt reports, saves when that is due, stands back for
//! requests, and ends when it is told to.

use super::attempt::{Attempt, computed};
use super::bundle;
use super::line::{self, Led, Parted};
use super::meter::Meter;
use super::stops::Will;
use super::team::Team;
use mlxnode_collective::MemberId;
use mlxnode_compute::{Advance, JobError};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, LossPoint, Report, RunEnd, SavePolicy};
use mlxnode_worker::{JobCallError, JobProcess, JobSetup, StagePlace};
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::warn;

/// Between two reports of progress.
const REPORT_PERIOD: Duration = Duration::from_millis(250);
/// Before a checkpoint is tried again for which there was no room.
const ROOM_PERIOD: Duration = Duration::from_secs(10);
/// A checkpoint by time waits for so many times as long as the last one took: that is 2% of the time.
const BETWEEN_SAVES: u32 = 49;

/// What of the attempt is saved.
struct Saved {
    step: u64,
    at: Instant,
    /// What writing took the last time.
    took: Duration,
    checkpoint: Option<Checkpoint>,
}

impl Saved {
    fn since(step: u64) -> Self {
        Self { step, at: Instant::now(), took: Duration::ZERO, checkpoint: None }
    }

    fn is_due(&self, policy: &SavePolicy, step: u64) -> bool {
        let by_steps = policy.every_steps > 0 && step >= self.step + policy.every_steps;
        let period = Duration::from_secs(policy.every_seconds).max(self.took * BETWEEN_SAVES);
        let by_time = policy.every_seconds > 0 && self.at.elapsed() >= period;
        step > self.step && (by_steps || by_time)
    }
}

impl Attempt {
    pub(super) async fn drive(
        &mut self,
        process: &mut JobProcess,
        setup: JobSetup,
        from: u64,
    ) -> Result<RunEnd, Parted> {
        self.say(Report::Preparing("starting".into())).await;
        let (mut team, mut led) = (None, None);
        if let Some(stage) = &setup.stage {
            led = Some(self.lead(process, stage).await?);
            self.say(Report::Preparing("the stages read their layers".into())).await;
            let mut told = self.told.clone();
            tokio::select! {
                begun = line::call(&mut led, process.begin(setup)) => begun?,
                () = told_to(&mut told, |will| will != Will::Run) => return Err(Parted::LetGo),
            }
        } else if self.order.spec.workers > 1 {
            team = Some(
                Team::lead(&self.place, &self.peers, &self.order, process, setup, self.reports.clone())
                    .await?,
            );
        } else {
            process.begin(setup).await?;
        }
        let process = &mut Driven { process, led, team, told: self.told.clone() };
        let policy = self.order.spec.saves;
        let (mut meter, mut saved) = (Meter::at(from), Saved::since(from));
        let mut is_running = false;
        let mut last_report = Instant::now();
        loop {
            let will = *self.told.borrow();
            let leaves = process.stage_leaves();
            match (will, leaves) {
                (Will::End, _) => return Ok(RunEnd::Yielded),
                (Will::Run, None) => {}
                (_, leaves) => {
                    if let Some(why) = leaves {
                        self.say(Report::Said(why.to_string())).await;
                    }
                    self.save_before(process, &mut meter, &mut saved, "the end").await;
                    return Ok(RunEnd::Yielded);
                }
            }
            if let Some(leaving) = process.helpers_leave() {
                let names: Vec<&str> = leaving.iter().map(|(_, name)| name.as_str()).collect();
                self.say(Report::Said(format!(
                    "helps no more, because its node stops: {}",
                    names.join(", ")
                )))
                .await;
                self.save_before(process, &mut meter, &mut saved, "it goes").await;
                process.let_go(leaving.into_iter().map(|(member, _)| member).collect());
            }
            let started = Instant::now();
            let advance = process.advance().await?;
            let piece = started.elapsed();
            let computed = computed(process.process, started);
            if !is_running && matches!(advance, Advance::Step(_) | Advance::Validated { .. }) {
                is_running = true;
                self.say(Report::Running { step: from }).await;
            }
            match advance {
                Advance::Prepared(what) if is_running => self.say(Report::Said(what)).await,
                Advance::Prepared(what) => self.say(Report::Preparing(what)).await,
                Advance::Step(step) => meter.step(&step, piece),
                Advance::Validated { step, loss, seconds } => {
                    meter.points.push(LossPoint { step, training: None, validation: Some(loss) });
                    self.say(Report::Said(format!(
                        "validation after step {step}: loss {loss:.4} ({seconds:.1} s)"
                    )))
                    .await;
                }
                Advance::Tested { loss } => {
                    self.say(Report::Said(format!("test: loss {loss:.4}, perplexity {:.3}", loss.exp())))
                        .await;
                }
                Advance::Finished => {
                    self.flush(&mut meter).await;
                    if let Some(checkpoint) = saved.checkpoint.filter(|_| saved.step == meter.step) {
                        return Ok(RunEnd::Finished(checkpoint));
                    }
                    return match self.save_when_there_is_room(process, meter.step).await? {
                        Some((checkpoint, _)) => Ok(RunEnd::Finished(checkpoint)),
                        None => Ok(RunEnd::Yielded),
                    };
                }
            }
            if last_report.elapsed() >= REPORT_PERIOD {
                last_report = Instant::now();
                self.flush(&mut meter).await;
            }
            if saved.is_due(&policy, meter.step) {
                self.flush(&mut meter).await;
                if let Some((checkpoint, took)) = self.save_when_there_is_room(process, meter.step).await? {
                    self.say(Report::Checkpointed(checkpoint.clone())).await;
                    let seconds = took.as_secs_f64();
                    self.say(Report::Said(format!("checkpoint after step {}: {seconds:.3} s", meter.step)))
                        .await;
                    (saved.checkpoint, saved.took) = (Some(checkpoint), took);
                }
                (saved.step, saved.at) = (meter.step, Instant::now());
            }
            meter.stood_back += self.stand_back(computed).await;
        }
    }

    /// Brings the stages of a divided model together, and says what it waits for.
    async fn lead(&self, process: &mut JobProcess, stage: &StagePlace) -> Result<Led, Parted> {
        let (tell, mut told) = mpsc::channel(4);
        let leading = Led::lead(&self.place, &self.peers, &self.order, process, stage, tell);
        let mut will = self.told.clone();
        tokio::pin!(leading);
        loop {
            tokio::select! {
                led = &mut leading => return led,
                Some(what) = told.recv() => self.say(Report::Preparing(what)).await,
                () = told_to(&mut will, |will| will != Will::Run) => return Err(Parted::LetGo),
            }
        }
    }

    async fn flush(&self, meter: &mut Meter) {
        if !meter.points.is_empty() {
            let points = std::mem::take(&mut meter.points);
            self.say(Report::Advanced { points, progress: Some(meter.progress()) }).await;
        }
    }

    /// A checkpoint, and how long writing it took; waits while there is no room. `None`: it was told to end meanwhile.
    async fn save_when_there_is_room(
        &mut self,
        process: &mut Driven<'_>,
        step: u64,
    ) -> Result<Option<(Checkpoint, Duration)>, Parted> {
        let mut is_held = false;
        loop {
            let begun = Instant::now();
            match self.write(process, step).await {
                Err(Parted::Own(JobCallError::Job(JobError::NoRoom(text)))) => {
                    if !std::mem::replace(&mut is_held, true) {
                        self.say(Report::Held(format!("no room on the disk: {text}"))).await;
                    }
                    let mut told = self.told.clone();
                    let ended = told.wait_for(|will| *will != Will::Run);
                    if tokio::time::timeout(ROOM_PERIOD, ended).await.is_ok() {
                        return Ok(None);
                    }
                }
                Ok(checkpoint) => {
                    if is_held {
                        self.say(Report::Going).await;
                    }
                    return Ok(Some((checkpoint, begun.elapsed())));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A checkpoint of what is not saved, if there is room: without one it goes on from the one before.
    async fn save_before(&self, process: &mut Driven<'_>, meter: &mut Meter, saved: &mut Saved, what: &str) {
        if meter.step <= saved.step {
            return;
        }
        self.flush(meter).await;
        match self.write(process, meter.step).await {
            Ok(checkpoint) => {
                self.say(Report::Checkpointed(checkpoint.clone())).await;
                (saved.step, saved.at, saved.checkpoint) = (meter.step, Instant::now(), Some(checkpoint));
            }
            Err(error) => {
                warn!(job = self.order.spec.id, %error, "no checkpoint before {what}");
                self.say(Report::Said(format!("no checkpoint before {what}: {error}"))).await;
            }
        }
    }

    async fn write(&self, process: &mut Driven<'_>, step: u64) -> Result<Checkpoint, Parted> {
        let (store, id, epoch) =
            (self.peers.store.clone(), self.order.spec.id.clone(), self.order.epoch.to_string());
        let begun = tokio::task::spawn_blocking(move || {
            let job = store.job(&id)?;
            let new = bundle::begin(&job, &epoch)?;
            Ok::<_, std::io::Error>((job, new, id))
        });
        let (job, new, id) = flatten(begun.await)?;
        process.save(new.folder().join(bundle::STATE)).await?;
        process.publish(new.folder().join(bundle::RESULT)).await?;
        let sealed = tokio::task::spawn_blocking(move || bundle::seal(&job, new.folder(), &id, step));
        Ok(flatten(sealed.await)?)
    }
}

/// Waits until this is what a run is told.
async fn told_to(told: &mut watch::Receiver<Will>, is_it: impl Fn(Will) -> bool) {
    // Whoever told is gone: then its task is about to be ended.
    let _ = told.wait_for(|will| is_it(*will)).await;
}

/// The process of a job that this node leads, with those on other nodes: the further workers, or the other stages, without which it does
/// not go on.
struct Driven<'a> {
    process: &'a mut JobProcess,
    led: Option<Led>,
    team: Option<Team>,
    told: watch::Receiver<Will>,
}

impl Driven<'_> {
    async fn advance(&mut self) -> Result<Advance, Parted> {
        let is_led = self.led.is_some();
        tokio::select! {
            advanced = line::call(&mut self.led, self.process.advance()) => advanced,
            // One process alone ends after the piece. A stage may wait for one that is lost.
            () = told_to(&mut self.told, |will| will == Will::End), if is_led => Err(Parted::LetGo),
        }
    }

    async fn save(&mut self, folder: PathBuf) -> Result<(), Parted> {
        line::call(&mut self.led, self.process.save(folder)).await
    }

    async fn publish(&mut self, folder: PathBuf) -> Result<(), Parted> {
        line::call(&mut self.led, self.process.publish(folder)).await
    }

    /// Does the node of another stage stop? Then the attempt ends.
    fn stage_leaves(&mut self) -> Option<Error> {
        self.led.as_mut().and_then(Led::leaving)
    }

    /// Workers whose nodes stop. The job goes on without them.
    fn helpers_leave(&mut self) -> Option<Vec<(MemberId, String)>> {
        self.team.as_mut().and_then(Team::leaving)
    }

    fn let_go(&self, members: Vec<MemberId>) {
        if let Some(team) = &self.team {
            team.let_go(members);
        }
    }
}

fn flatten<T>(done: Result<std::io::Result<T>, tokio::task::JoinError>) -> Result<T, JobCallError> {
    use std::io::ErrorKind;
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            Err(JobError::NoRoom(error.to_string()).into())
        }
        Ok(Err(error)) => Err(JobError::Failed(format!("cannot write a checkpoint: {error}")).into()),
        Err(error) => Err(JobError::Failed(format!("cannot write a checkpoint: {error}")).into()),
    }
}
