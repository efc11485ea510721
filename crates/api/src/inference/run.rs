//! One request on its way: checked and prepared, then its samples as they come.

use crate::caller::Caller;
use crate::conversation::{
    Answers, Conversation, Format, Model, ReasoningCount, check_grammar, find_model, prepare,
};
use crate::error::ApiError;
use crate::front::{AnswerEvent, Front, GenerationRequest, Input, Piece, Prepared, Summary};
use mlxnode_compute::{ByteCount, Sampled};
use mlxnode_coordinator::requests::Parameters;
use mlxnode_text::Delta;
use std::time::Instant;

/// What a client asks for, read but not looked at yet.
pub(super) struct Asked {
    /// Deployment, source or `NAME:ADAPTER`.
    pub(super) model: String,
    pub(super) what: What,
    /// 1 to 16.
    pub(super) samples: usize,
}

/// What is continued.
pub(super) enum What {
    Chat(Box<Conversation>),
    Plain(Box<Plain>),
}

/// Text or tokens as they are.
pub(super) struct Plain {
    pub(super) input: Input,
    pub(super) format: Format,
    pub(super) parameters: Parameters,
    pub(super) extra_eos: Vec<String>,
    pub(super) deadline: Option<Instant>,
}

/// The samples of a request.
pub(super) struct Run {
    front: Front,
    prepared: Prepared,
    answers: Answers,
    samples: Vec<Sample>,
    /// May there be several calls?
    parallel: bool,
    is_over: bool,
}

#[derive(Clone, Default)]
struct Sample {
    /// Something was said.
    begun: bool,
    calls: usize,
    reasoning: ReasoningCount,
}

/// What comes of a sample next.
pub(super) struct Said {
    pub(super) sample: usize,
    /// In the first of a sample.
    pub(super) prompt_tokens: Option<usize>,
    pub(super) piece: Piece,
    pub(super) scores: Vec<Sampled>,
    /// In the last one.
    pub(super) end: Option<Ended>,
}

/// How a sample ended.
pub(super) struct Ended {
    pub(super) summary: Summary,
    pub(super) reasoning_tokens: usize,
    pub(super) has_calls: bool,
    pub(super) peak_memory: ByteCount,
}

impl Run {
    /// Checks everything that can be known before the first step, and starts.
    pub(super) async fn start(front: &Front, caller: &Caller, asked: Asked) -> Result<Self, ApiError> {
        let told = Self::begin(front, caller, asked).await;
        let is_limited = caller.key.as_ref().is_some_and(|key| !key.models.is_empty());
        told.map_err(|error| if is_limited { error.without_names() } else { error })
    }

    async fn begin(front: &Front, caller: &Caller, asked: Asked) -> Result<Self, ApiError> {
        let Asked { model, what, samples } = asked;
        let model = find_model(front, caller, &model).await?;
        let (prepared, parallel) = match what {
            What::Chat(conversation) => {
                let parallel = conversation.tools.parallel;
                (prepare(front, caller, &model, *conversation).await?, parallel)
            }
            What::Plain(asked) => (plain(front, caller, &model, *asked).await?, true),
        };
        let answers = Answers::open(front, std::slice::from_ref(&prepared), samples).await?;
        let samples = vec![Sample::default(); samples];
        Ok(Self { front: front.clone(), prepared, answers, samples, parallel, is_over: false })
    }

    /// What comes next; none after the last sample's end and after an error.
    pub(super) async fn next(&mut self) -> Option<Result<Said, ApiError>> {
        if self.is_over {
            return None;
        }
        let (index, event) = self.answers.next().await?;
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                self.is_over = true;
                return Some(Err(error));
            }
        };
        let sample = &mut self.samples[index];
        let prompt_tokens =
            (!std::mem::replace(&mut sample.begun, true)).then_some(self.prepared.valid.prompt.len());
        let (mut piece, scores, summary) = match event {
            AnswerEvent::Prompt(scores) => (Piece::default(), scores, None),
            AnswerEvent::Piece(piece) => (piece, Vec::new(), None),
            AnswerEvent::Ended { piece, summary } => (piece, Vec::new(), Some(summary)),
        };
        sample.read(&mut piece, self.parallel);
        let end = match summary {
            None => None,
            Some(summary) => Some(Ended {
                summary,
                reasoning_tokens: sample.reasoning.tokens,
                has_calls: sample.calls > 0,
                peak_memory: self.front.peak_memory(&self.prepared.deployment).await,
            }),
        };
        Some(Ok(Said { sample: index, prompt_tokens, piece, scores, end }))
    }
}

impl Sample {
    /// Counts what a piece means; further calls are taken out where there may be only one.
    fn read(&mut self, piece: &mut Piece, parallel: bool) {
        if piece.tokens.is_empty() {
            return;
        }
        let (mut reasoning, mut other) = (false, false);
        piece.deltas.retain(|delta| match delta {
            Delta::Reasoning(_) => {
                reasoning = true;
                true
            }
            Delta::ToolCall(_) | Delta::ToolCallStarted => {
                other = true;
                let is_extra = !parallel && self.calls > 0;
                self.calls += usize::from(!is_extra && matches!(delta, Delta::ToolCall(_)));
                !is_extra
            }
            Delta::Content(_) | Delta::Warning(_) => {
                other = true;
                true
            }
        });
        self.reasoning.take(reasoning, other);
    }
}

/// Everything before the first step.
async fn plain(front: &Front, caller: &Caller, model: &Model, asked: Plain) -> Result<Prepared, ApiError> {
    let Plain { input, format, mut parameters, extra_eos, deadline } = asked;
    if let Format::Grammar(grammar) = format {
        check_grammar(model, Some(&grammar), "format").await?;
        parameters.grammar = Some(grammar);
    }
    if parameters.adapter.is_none() {
        parameters.adapter.clone_from(&model.adapter);
    }
    let request = GenerationRequest {
        model: model.deployment.name.clone(),
        input,
        parameters,
        extra_eos,
        deadline,
        tenant: caller.tenant.clone(),
        trace: caller.trace,
        is_read: true,
    };
    Ok(front.prepare(request).await?)
}
