//! What every dialect does with a generation: find the model, run the samples, hand on their events.

use crate::deployments::DeploymentView;
use crate::front::{Answer, AnswerEvent, Front, FrontError, ModelText, Prepared};
use crate::http::{ApiError, Caller, ErrorKind, HttpServices};
use futures::StreamExt as _;
use futures::stream::{BoxStream, SelectAll};
use mlxnode_compute::Grammar;
use mlxnode_text::grammar::Source;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// The model that a request means.
pub(super) struct Model {
    pub(super) deployment: DeploymentView,
    pub(super) text: Arc<ModelText>,
    /// The adapter that its name asks for, as in `base:adapter`.
    pub(super) adapter: Option<String>,
}

/// mlx_lm.server's word for "the one that is loaded".
const ANY_MODEL: &str = "default_model";

impl HttpServices {
    /// Finds a model by what the client wrote into `model`: a deployment's name, where its weights come from, or `NAME:ADAPTER`.
    pub(super) async fn model(&self, caller: &Caller, model: &str) -> Result<Model, ApiError> {
        let name = if model == ANY_MODEL { "" } else { model };
        let (deployment, adapter) = self.front.find(name)?;
        if !caller.may_use(&deployment.name) {
            // Whoever may not use a model need not learn that it is there.
            let error = ApiError::new(ErrorKind::NoModel, format!("no model named {model:?} is loaded"));
            return Err(ApiError { param: Some("model".to_owned()), ..error });
        }
        let text = self.front.text_of(&deployment).await?;
        Ok(Model { deployment, text, adapter })
    }
}

/// The grammar, compiled once to see whether it can be: the last stage compiles it again for itself.
pub(super) async fn check_grammar(
    model: &Model,
    grammar: Option<&Grammar>,
    param: &str,
) -> Result<(), ApiError> {
    let Some(grammar) = grammar.cloned() else { return Ok(()) };
    if grammar.text().len() > Grammar::MAX_BYTES {
        let message = format!("{param} has {} bytes, more than {}", grammar.text().len(), Grammar::MAX_BYTES);
        return Err(ApiError::field(param, message));
    }
    let text = Arc::clone(&model.text);
    let compiling = tokio::task::spawn_blocking(move || {
        let vocabulary = text.grammars()?;
        vocabulary.compile(source(&grammar)).map(drop)
    });
    let compiled = compiling
        .await
        .map_err(|_| ApiError::new(ErrorKind::Internal, "the grammar could not be compiled"))?;
    compiled.map_err(|error| ApiError::field(param, format!("{param}: {error}")))
}

fn source(grammar: &Grammar) -> Source<'_> {
    match grammar {
        Grammar::JsonObject => Source::JsonObject,
        Grammar::JsonSchema(text) => Source::JsonSchema(text),
        Grammar::Regex(text) => Source::Regex(text),
        Grammar::Lark(text) => Source::Lark(text),
    }
}

/// What came of one sample so far, and whose it is.
type Told = (usize, Result<AnswerEvent, FrontError>);

/// The samples of one request, running at the same time. Dropping it cancels what still runs.
pub(super) struct Answers {
    running: SelectAll<BoxStream<'static, Told>>,
    first: VecDeque<Told>,
}

/// A replica that does not take a request says so at once; longer than this nobody waits before an answer is opened.
const REFUSAL_TIME: Duration = Duration::from_millis(250);

impl Answers {
    /// Starts `samples` of each; answers are numbered prompt by prompt. Waits a moment for a refusal, so that it can have its status.
    ///
    /// # Errors
    /// When one of them is refused.
    pub(super) async fn start(
        front: &Front,
        prepared: &[Prepared],
        samples: usize,
    ) -> Result<Self, ApiError> {
        let mut running = SelectAll::new();
        for (prompt, prepared) in prepared.iter().enumerate() {
            for sample in 0..samples {
                let answer = front.start(prepared, sample as u64).await?;
                running.push(events(prompt * samples + sample, answer));
            }
        }
        let mut answers = Self { running, first: VecDeque::new() };
        if let Ok(Some(told)) = tokio::time::timeout(REFUSAL_TIME, answers.running.next()).await {
            match told {
                (_, Err(error)) => return Err(error.into()),
                told => answers.first.push_back(told),
            }
        }
        Ok(answers)
    }

    /// The next event of any of them; none after the last one.
    pub(super) async fn next(&mut self) -> Option<(usize, Result<AnswerEvent, ApiError>)> {
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
