//! The other stages of a training, as the trainer of one speaks to them: arrays instead of bytes, and all of them of one mind before anything counts.

use super::{PrepareError, STATE_FILE};
use bytes::Bytes;
use mlxnode_compute::{Activation, Dtype as Elements, JobError, LinkError, StageLink, StageOrder, Way};
use mlxnode_mlx::{Array, Device, Dtype};
use std::path::{Path, PathBuf};

/// Numbers of an exchange.
const MOST_NUMBERS: usize = 1024;
/// Activations of one micro-batch: a link has room for so many.
pub(super) const MOST_PIECES: usize = 4;
/// A stage's reason to stop is no longer.
const LONGEST_REASON: u64 = 2000;
/// The own part of a state, or a reason, on its way.
const PART_FILE: &str = "part.safetensors";
const REASON_FILE: &str = "reason.txt";

/// The line of stages, with a folder for files on their way.
pub(super) struct Line {
    link: Box<dyn StageLink>,
    folder: PathBuf,
}

/// The line is no more, or an array could not be handed on.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Device(#[from] mlxnode_mlx::Error),
}

/// Why a stage cannot do what all are about to do.
#[derive(Clone, Debug)]
pub(super) enum Trouble {
    NoRoom(String),
    Refused(String),
    Failed(String),
}

impl Trouble {
    fn number(&self) -> f64 {
        match self {
            Self::NoRoom(_) => 1.0,
            Self::Refused(_) => 2.0,
            Self::Failed(_) => 3.0,
        }
    }

    fn of(number: f64, words: String) -> Self {
        if number == 1.0 {
            Self::NoRoom(words)
        } else if number == 2.0 {
            Self::Refused(words)
        } else {
            Self::Failed(words)
        }
    }

    fn words(&self) -> &str {
        match self {
            Self::NoRoom(words) | Self::Refused(words) | Self::Failed(words) => words,
        }
    }
}

impl From<JobError> for Trouble {
    fn from(error: JobError) -> Self {
        match error {
            JobError::NoRoom(words) => Self::NoRoom(words),
            JobError::Refused(words) => Self::Refused(words),
            other => Self::Failed(other.to_string()),
        }
    }
}

impl From<Trouble> for JobError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::NoRoom(words) => Self::NoRoom(words),
            Trouble::Refused(words) => Self::Refused(words),
            Trouble::Failed(words) => Self::Failed(words),
        }
    }
}

impl From<Trouble> for PrepareError {
    fn from(trouble: Trouble) -> Self {
        Self::Stages { problem: trouble.words().to_owned() }
    }
}

impl Line {
    pub(super) fn new(link: Box<dyn StageLink>, folder: PathBuf) -> Self {
        Self { link, folder }
    }

    pub(super) fn stage(&self) -> usize {
        self.link.stage()
    }

    pub(super) fn stages(&self) -> usize {
        self.link.stages()
    }

    pub(super) fn lead(&mut self, order: &StageOrder) -> Result<(), LinkError> {
        self.link.lead(order)
    }

    pub(super) fn follow(&mut self) -> Result<StageOrder, LinkError> {
        self.link.follow()
    }

    /// The numbers of all stages, each of which gives as many.
    pub(super) fn exchange(&mut self, numbers: &[f64]) -> Result<Vec<Vec<f64>>, LinkError> {
        let mut all: Vec<Vec<f64>> = vec![Vec::with_capacity(numbers.len()); self.stages()];
        let portions = numbers.chunks(MOST_NUMBERS);
        // Also where there is nothing to say the stages wait for each other.
        let portions: Vec<&[f64]> = if numbers.is_empty() { vec![&[]] } else { portions.collect() };
        for portion in portions {
            let given = self.link.exchange(portion)?;
            if given.len() != all.len() || given.iter().any(|given| given.len() != portion.len()) {
                return Err(LinkError::OutOfStep("a stage gives another count of numbers".to_owned()));
            }
            all.iter_mut().zip(given).for_each(|(all, given)| all.extend(given));
        }
        Ok(all)
    }

    /// Hands an array `[1, tokens, width]` on.
    pub(super) fn send(
        &mut self,
        device: &Device,
        way: Way,
        micro_batch: u64,
        array: &Array,
    ) -> Result<(), HandError> {
        let elements = match array.dtype() {
            Dtype::F32 => Elements::F32,
            Dtype::F16 => Elements::F16,
            Dtype::BF16 => Elements::BF16,
            other => return Err(out_of_step(format!("hidden vectors of element type {other:?}"))),
        };
        let (tokens, width) = (size(array.dim(1)), size(array.dim(2)));
        let bytes = Bytes::from(device.contiguous(array)?.to_bytes()?);
        let row = width * elements.size();
        let most = rows_of_a_piece(row);
        for start in (0..tokens).step_by(most) {
            let end = (start + most).min(tokens);
            let part = bytes.slice(start * row..end * row);
            let part = Activation::new(end - start, width, elements, part);
            let part = part.map_err(|error| out_of_step(error.to_string()))?;
            self.link.send(way, micro_batch, part)?;
        }
        Ok(())
    }

    /// Waits for an array `[1, tokens, width]`; `dtype` where only one is right.
    pub(super) fn receive(
        &mut self,
        way: Way,
        micro_batch: u64,
        [tokens, width]: [usize; 2],
        dtype: Option<Dtype>,
    ) -> Result<Array, HandError> {
        let (mut bytes, mut taken, mut known) = (Vec::new(), 0, dtype);
        while taken < tokens {
            let part = self.link.receive(way, micro_batch)?;
            let elements = match part.dtype() {
                Elements::F32 => Dtype::F32,
                Elements::F16 => Dtype::F16,
                Elements::BF16 => Dtype::BF16,
            };
            let is_due = part.hidden() == width
                && (1..=tokens - taken).contains(&part.tokens())
                && *known.get_or_insert(elements) == elements;
            if !is_due {
                let (found, hidden) = (part.tokens(), part.hidden());
                return Err(out_of_step(format!(
                    "{found} x {hidden} numbers of type {elements:?} came for micro-batch {micro_batch}, but {} x {width} of type {known:?} are due",
                    tokens - taken
                )));
            }
            taken += part.tokens();
            bytes.extend_from_slice(part.bytes());
        }
        let shape = [1, tokens, width].map(|size| i32::try_from(size).unwrap_or(i32::MAX));
        Ok(Array::from_bytes(&bytes, &shape, known.unwrap_or(Dtype::F32))?)
    }

    /// Tells the others whether this stage is ready, and hears whether they are: what is in the way of the first that is not. All stages
    /// come to the same end; stage 0 has all words.
    pub(super) fn agree(&mut self, own: Option<Trouble>) -> Result<Option<Trouble>, LinkError> {
        let numbers = self.exchange(&[own.as_ref().map_or(0.0, Trouble::number)])?;
        let numbers: Vec<f64> = numbers.into_iter().flatten().collect();
        let Some(first) = numbers.iter().position(|number| *number != 0.0) else { return Ok(None) };
        let file = self.folder.join(REASON_FILE);
        let words = own.as_ref().map_or("", Trouble::words);
        let unwritten = |error: std::io::Error| LinkError::File(error.to_string());
        std::fs::create_dir_all(&self.folder)
            .and_then(|()| std::fs::write(&file, words))
            .map_err(unwritten)?;
        let files = self.link.gather(&file)?;
        let told = files.get(first).map(|file| reason(file));
        let _ = std::fs::remove_file(&file);
        let words = match (told, own) {
            (Some(words), _) if first == 0 => words,
            (Some(words), _) => format!("stage {first}: {words}"),
            (None, Some(own)) => own.words().to_owned(),
            (None, None) => format!("stage {first} cannot go on; stage 0 says why"),
        };
        Ok(numbers.get(first).map(|number| Trouble::of(*number, words)))
    }

    /// Brings what `write` writes on each stage to stage 0: there all files in order, elsewhere none.
    pub(super) fn collect(
        &mut self,
        write: impl FnOnce(&Path) -> Result<(), JobError>,
    ) -> Result<Result<Vec<PathBuf>, Trouble>, LinkError> {
        let file = self.part();
        let folder = std::fs::create_dir_all(&self.folder).map_err(super::io);
        let own = folder.and_then(|()| write(&file)).err().map(Trouble::from);
        if let Some(trouble) = self.agree(own)? {
            self.tidy();
            return Ok(Err(trouble));
        }
        let files = self.link.gather(&file)?;
        if self.stage() > 0 {
            self.tidy();
        }
        Ok(Ok(files))
    }

    /// The own part of what is collected goes away.
    pub(super) fn tidy(&self) {
        let _ = std::fs::remove_file(self.part());
    }

    fn part(&self) -> PathBuf {
        self.folder.join(PART_FILE)
    }

    /// Stage 0 gives the folder's state to all: where it lies here. MLX knows a file's kind by its name.
    pub(super) fn scatter(&mut self, directory: Option<&Path>) -> Result<PathBuf, LinkError> {
        let given = directory.map(|directory| directory.join(STATE_FILE));
        let came = self.link.scatter(given.as_deref())?;
        if came.extension().is_some_and(|ending| ending == "safetensors") {
            return Ok(came);
        }
        let named = came.with_extension("safetensors");
        std::fs::rename(&came, &named).map_err(|error| LinkError::File(error.to_string()))?;
        Ok(named)
    }
}

/// How many rows of so many bytes travel together.
fn rows_of_a_piece(row: usize) -> usize {
    (Activation::MAX_BYTES / row.max(1)).max(1)
}

/// Can so many tokens of this width be handed on at once?
pub(super) fn can_hand_on(tokens: usize, width: usize) -> bool {
    /// Bytes of the largest element.
    const ELEMENT: usize = 4;
    let row = width.saturating_mul(ELEMENT);
    row <= Activation::MAX_BYTES && tokens.div_ceil(rows_of_a_piece(row)) <= MOST_PIECES
}

fn reason(file: &Path) -> String {
    use std::io::Read as _;
    let mut text = Vec::new();
    let read = std::fs::File::open(file).and_then(|file| file.take(LONGEST_REASON).read_to_end(&mut text));
    match read {
        Ok(_) => String::from_utf8_lossy(&text).into_owned(),
        Err(_) => "it does not say why".to_owned(),
    }
}

fn size(dimension: i32) -> usize {
    usize::try_from(dimension).unwrap_or(0)
}

fn out_of_step(problem: String) -> HandError {
    LinkError::OutOfStep(problem).into()
}
