//! A job that learns nothing: [`Rehearsal`] reads its files again and again and calls a number about them a loss.
//!
//! It shows that a cluster runs jobs, saves, moves and resumes them, without a model: what it makes depends on its files and its number of
//! steps alone, so that a result after any number of kills can be compared with one after none.

use mlxnode_compute::{Activation, Advance, Dtype, Job, JobError, StageLink, StageOrder, StepReport, Way};
use std::fs;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The file that holds a state, and the one that holds the result.
const STATE: &str = "state.txt";
const RESULT: &str = "result.txt";
/// Most steps.
const MAX_STEPS: u64 = 10_000_000;
/// Longest pause of a step.
const MAX_MILLIS: u64 = 10_000;

/// See the module.
pub struct Rehearsal {
    files: Vec<PathBuf>,
    steps: u64,
    pause: Duration,
    done: u64,
    state: u64,
    is_prepared: bool,
    /// A step was done by this process.
    is_moved: bool,
    line: Option<Box<dyn StageLink>>,
}

impl Rehearsal {
    /// `configuration` has lines `steps: N` (10 when absent) and `millis: N` (the length of a step, 0 when absent). `inputs` are the files;
    /// `resume` is where [`Job::save`] wrote before.
    ///
    /// # Errors
    /// [`JobError::Refused`] when the configuration makes no sense, [`JobError::Failed`] when a file cannot be read.
    pub fn new(configuration: &str, inputs: &Path, resume: Option<&Path>) -> Result<Self, JobError> {
        let (mut steps, mut millis) = (10, 0);
        for line in
            configuration.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            let (key, value) = line.split_once(':').unwrap_or((line, ""));
            let number = |most: u64| match value.trim().parse::<u64>() {
                Ok(number) if number <= most => Ok(number),
                _ => Err(JobError::Refused(format!("{key} is {:?}, but must be 0 to {most}", value.trim()))),
            };
            match key.trim() {
                "steps" => steps = number(MAX_STEPS)?,
                "millis" => millis = number(MAX_MILLIS)?,
                other => {
                    return Err(JobError::Refused(format!(
                        "a rehearsal knows the keys steps and millis, not {other:?}"
                    )));
                }
            }
        }
        let unreadable = |error: std::io::Error| JobError::Failed(format!("cannot read the files: {error}"));
        let mut files = Vec::new();
        for entry in fs::read_dir(inputs).map_err(unreadable)? {
            files.push(entry.map_err(unreadable)?.path());
        }
        files.sort();
        let (done, state) = match resume {
            None => (0, 0),
            Some(folder) => read_state(&folder.join(STATE))?,
        };
        let pause = Duration::from_millis(millis);
        Ok(Self { files, steps, pause, done, state, is_prepared: false, is_moved: false, line: None })
    }

    /// As one stage of several: each reads some of the files, and hands on what it has. The result is the same.
    #[must_use]
    pub fn with_stages(mut self, line: Box<dyn StageLink>) -> Self {
        let (stage, stages, files) = (line.stage(), line.stages(), self.files.len());
        self.files = self.files[files * stage / stages..files * (stage + 1) / stages].to_vec();
        self.line = Some(line);
        self
    }

    /// The state after the next step: all bytes of all files folded into it.
    fn next_state(&mut self) -> Result<u64, JobError> {
        let first = self.state ^ 0xcbf2_9ce4_8422_2325 ^ self.done;
        let Some(mut line) = self.line.take() else { return Ok(self.fold(first)?.wrapping_mul(PRIME)) };
        let passed = line.lead(&StageOrder::Update(self.done..=self.done)).map_err(JobError::from);
        let passed = passed.and_then(|()| self.pass(line.as_mut(), first));
        self.line = Some(line);
        passed
    }

    /// This stage's part of a step: the state that comes, with this stage's files folded in, goes on, and the last one's comes back.
    fn pass(&self, line: &mut dyn StageLink, first: u64) -> Result<u64, JobError> {
        let (stage, is_last) = (line.stage(), line.stage() + 1 == line.stages());
        let step = self.done;
        let state = match stage {
            0 => first,
            _ => unpacked(&line.receive(Way::Forward, step)?)?,
        };
        let mut state = self.fold(state)?;
        if is_last {
            state = state.wrapping_mul(PRIME);
        } else {
            line.send(Way::Forward, step, packed(state)?)?;
            state = unpacked(&line.receive(Way::Backward, step)?)?;
        }
        if stage > 0 {
            line.send(Way::Backward, step, packed(state)?)?;
        }
        let all = line.exchange(&[step as f64])?;
        match all.iter().all(|numbers| *numbers == [step as f64]) {
            true => Ok(state),
            false => Err(JobError::Failed(format!("the stages are at the steps {all:?}"))),
        }
    }

    /// What another stage wants: one step, or a file that says how far this one is.
    fn follow(&mut self, line: &mut dyn StageLink) -> Result<Advance, JobError> {
        match line.follow()? {
            StageOrder::Update(steps) => {
                self.done = *steps.start();
                self.state = self.pass(line, 0)?;
                self.done += 1;
                Ok(Advance::Prepared(format!("step {}", self.done)))
            }
            StageOrder::Save => {
                let file = std::env::temp_dir().join(format!("mlxnode-rehearsal-{}", std::process::id()));
                write(&file, &format!("{} {}\n", self.done, self.state))?;
                let gathered = line.gather(&file).map_err(JobError::from);
                let _ = fs::remove_file(&file); // a file of a few bytes, of this process
                gathered.map(|_| Advance::Prepared("saved".into()))
            }
            StageOrder::Finish => Ok(Advance::Finished),
            other => Err(JobError::Failed(format!("a rehearsal has nothing to do for {other:?}"))),
        }
    }

    /// All bytes of this process's files folded into a state (FNV-1a).
    fn fold(&self, mut state: u64) -> Result<u64, JobError> {
        let mut buffer = vec![0; 64 << 10];
        for path in &self.files {
            let unreadable = |error| JobError::Failed(format!("cannot read {}: {error}", path.display()));
            let mut file = fs::File::open(path).map_err(unreadable)?;
            loop {
                let count = file.read(&mut buffer).map_err(unreadable)?;
                if count == 0 {
                    break;
                }
                for byte in &buffer[..count] {
                    state = (state ^ u64::from(*byte)).wrapping_mul(PRIME);
                }
            }
        }
        Ok(state)
    }
}

/// The prime of FNV-1a.
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// A state as hidden vectors: two numbers, whatever they are.
fn packed(state: u64) -> Result<Activation, JobError> {
    let activation = Activation::new(1, 2, Dtype::F32, state.to_le_bytes().to_vec().into());
    activation.map_err(|error| JobError::Failed(error.to_string()))
}

fn unpacked(activation: &Activation) -> Result<u64, JobError> {
    let bytes = <[u8; 8]>::try_from(&activation.bytes()[..]);
    bytes.map(u64::from_le_bytes).map_err(|_| JobError::Failed("another stage hands on no state".into()))
}

fn read_state(path: &Path) -> Result<(u64, u64), JobError> {
    let wrong = || JobError::Failed(format!("{} is no state of a rehearsal", path.display()));
    let text = fs::read_to_string(path)
        .map_err(|error| JobError::Failed(format!("cannot read {}: {error}", path.display())))?;
    let (done, state) = text.trim().split_once(' ').ok_or_else(wrong)?;
    Ok((done.parse().map_err(|_| wrong())?, state.parse().map_err(|_| wrong())?))
}

fn write(path: &Path, text: &str) -> Result<(), JobError> {
    fs::write(path, text).map_err(|error| {
        let told = format!("{}: {error}", path.display());
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => JobError::NoRoom(told),
            _ => JobError::Failed(format!("cannot write {told}")),
        }
    })
}

impl Job for Rehearsal {
    fn advance(&mut self) -> Result<Advance, JobError> {
        if !std::mem::replace(&mut self.is_prepared, true) {
            return Ok(Advance::Prepared(format!("reading {} files", self.files.len())));
        }
        if let Some(mut line) = self.line.take_if(|line| line.stage() > 0) {
            let followed = self.follow(line.as_mut());
            self.line = Some(line);
            return followed;
        }
        if self.done >= self.steps {
            return Ok(Advance::Finished);
        }
        let started = Instant::now();
        self.state = self.next_state()?;
        self.done += 1;
        self.is_moved = true;
        std::thread::sleep(self.pause);
        Ok(Advance::Step(StepReport {
            step: self.done,
            steps: self.steps,
            // Falls, and shows which state it is of.
            loss: 1.0 / self.done as f64 + (self.state % 1000) as f64 * 1e-6,
            tokens: self.files.len() as u64,
            learning_rate: 0.0,
            gradient_norm: None,
            seconds: started.elapsed().as_secs_f64(),
            peak_memory: 0,
        }))
    }

    fn save(&mut self, directory: &Path) -> Result<(), JobError> {
        let own = directory.join(STATE);
        let state = format!("{} {}\n", self.done, self.state);
        write(&own, &state)?;
        let Some(line) = &mut self.line else { return Ok(()) };
        line.lead(&StageOrder::Save)?;
        for file in line.gather(&own)? {
            // Before the first step the others know nothing.
            if self.is_moved && fs::read_to_string(&file).ok().as_deref() != Some(state.as_str()) {
                return Err(JobError::Failed("the stages do not have the same state".into()));
            }
        }
        Ok(())
    }

    fn publish(&mut self, directory: &Path) -> Result<(), JobError> {
        write(&directory.join(RESULT), &format!("{:016x} after {} steps\n", self.state, self.done))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(job: &mut Rehearsal, steps: u64) {
        let mut done = 0;
        while done < steps {
            match job.advance().unwrap() {
                Advance::Step(_) => done += 1,
                Advance::Finished => return,
                _ => {}
            }
        }
    }

    #[test]
    fn a_rehearsal_that_is_cut_short_comes_to_the_same_result() {
        let folder = tempfile::tempdir().unwrap();
        let [inputs, whole, saved, end] =
            ["inputs", "whole", "saved", "end"].map(|name| folder.path().join(name));
        for path in [&inputs, &whole, &saved, &end] {
            fs::create_dir(path).unwrap();
        }
        fs::write(inputs.join("a"), "rows").unwrap();
        let mut job = Rehearsal::new("steps: 7", &inputs, None).unwrap();
        run(&mut job, 9);
        job.publish(&whole).unwrap();
        let mut job = Rehearsal::new("steps: 7\n", &inputs, None).unwrap();
        run(&mut job, 3);
        job.save(&saved).unwrap();
        let mut job = Rehearsal::new("steps: 7", &inputs, Some(&saved)).unwrap();
        run(&mut job, 9);
        job.publish(&end).unwrap();
        let text = |folder: &Path| fs::read_to_string(folder.join(RESULT)).unwrap();
        assert_eq!(text(&whole), text(&end));
        assert!(text(&end).ends_with("after 7 steps\n"));
        fs::write(inputs.join("a"), "other rows").unwrap();
        let mut job = Rehearsal::new("steps: 7", &inputs, None).unwrap();
        run(&mut job, 9);
        job.publish(&end).unwrap();
        assert_ne!(text(&whole), text(&end), "the files count");
    }

    #[test]
    fn a_wrong_key_or_number_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for wrong in ["iters: 3", "steps: many", "millis: 99999999"] {
            assert!(
                matches!(Rehearsal::new(wrong, folder.path(), None), Err(JobError::Refused(_))),
                "{wrong}"
            );
        }
        fs::write(folder.path().join(STATE), "not a state").unwrap();
        assert!(matches!(Rehearsal::new("", folder.path(), Some(folder.path())), Err(JobError::Failed(_))));
    }
}
