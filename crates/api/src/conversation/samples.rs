//! The samples of a request, running at the same time.

use crate::error::ApiError;
use crate::front::{Answer, AnswerEvent, Front, FrontError, Prepared};
use futures::StreamExt as _;
use futures::stream::{BoxStream, SelectAll};
use std::collections::VecDeque;
use std::time::Duration;

/// What came of one sample so far, and whose it is.
type Told = (usize, Result<AnswerEvent, FrontError>);

/// The samples of one request, running at the same time. Dropping it cancels what still runs.
pub(crate) struct Answers {
    running: SelectAll<BoxStream<'static, Told>>,
    first: VecDeque<Told>,
}

/// A replica that does not take a request says so at once; longer than this nobody waits before an answer is opened.
const REFUSAL_TIME: Duration = Duration::from_millis(250);

impl Answers {
    /// Starts `samples` of each; answers are numbered prompt by prompt.
    ///
    /// # Errors
    /// When one of them is refused.
    pub(crate) async fn open(front: &Front, prepared: &[Prepared], samples: usize) -> Result<Self, ApiError> {
        let mut running = SelectAll::new();
        for (prompt, prepared) in prepared.iter().enumerate() {
            for sample in 0..samples {
                let answer = front.start(prepared, sample as u64).await?;
                running.push(events(prompt * samples + sample, answer));
            }
        }
        Ok(Self { running, first: VecDeque::new() })
    }

    /// [`Self::open`], and a moment's wait for a refusal, so that it can have its status.
    ///
    /// # Errors
    /// When one of them is refused.
    pub(crate) async fn start(
        front: &Front,
        prepared: &[Prepared],
        samples: usize,
    ) -> Result<Self, ApiError> {
        let mut answers = Self::open(front, prepared, samples).await?;
        if let Ok(Some(told)) = tokio::time::timeout(REFUSAL_TIME, answers.running.next()).await {
            match told {
                (_, Err(error)) => return Err(error.into()),
                told => answers.first.push_back(told),
            }
        }
        Ok(answers)
    }

    /// The next event of any of them; none after the last one.
    pub(crate) async fn next(&mut self) -> Option<(usize, Result<AnswerEvent, ApiError>)> {
        let (index, event) = match self.first.pop_front() {
            Some(told) => told,
            None => self.running.next().await?,
        };
        Some((index, event.map_err(ApiError::from)))
    }
}

fn events(index: usize, answer: Answer) -> BoxStream<'static, Told> {
    futures::stream::unfold(answer, move |mut answer| async move {
        let event = answer.next().await?;
        Some(((index, event), answer))
    })
    .boxed()
}
