//! `/v1/completions`: text as it is, without a template; also what lm-evaluation-harness scores answers with (`echo` and `logprobs`).

use super::chat::{fingerprint, include_usage};
use super::logprobs::TextLogprobs;
use super::usage::Usage;
use super::{format, sampling};
use crate::conversation::Format;
use crate::conversation::{Answers, check_grammar};
use crate::front::{AnswerEvent, End, GenerationRequest, Input, Piece, Prepared, SamplingDefaults};
use crate::http::body::JsonBody;
use crate::http::events::{self, Events, Gone};
use crate::http::fields::{Fields, wrong};
use crate::http::{ApiError, Caller, Dialect, HttpServices, id, unix_time};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use mlxnode_compute::Sampled;
use mlxnode_coordinator::requests::Parameters;
use mlxnode_text::Tokenizer;
use serde::Serialize;
use serde_json::Value;

/// Most prompts of a request.
const MAX_PROMPTS: usize = 128;
/// Most answers of a request: each is a sequence of its own.
const MAX_ANSWERS: usize = 128;
/// Most tokens of a prompt that is looked at: beyond any model's context.
const MAX_PROMPT_TOKENS: usize = 4 << 20;
/// OpenAI's number of tokens for who does not say.
const DEFAULT_MAX_TOKENS: i64 = 16;

/// What a request says besides prompts and sampling.
#[derive(Clone)]
struct Wish {
    samples: usize,
    stream: bool,
    include_usage: bool,
    logprobs: bool,
    echo: bool,
    /// `max_tokens` is 0: the prompt is scored, and nothing is said.
    silent: bool,
}

#[derive(Clone, Serialize)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
}

/// The handler.
pub(in crate::http) async fn completions(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let mut fields = body.fields;
    let name = fields.string("model")?.unwrap_or_default();
    let model = services.model(&caller, &name).await?;
    let prompts = prompts(&mut fields, "prompt")?;
    let (format, format_field) = format::format(&mut fields)?;
    let (mut parameters, wish) = read(fields, &model.text.sampling)?;
    if prompts.len() * wish.samples > MAX_ANSWERS {
        let count = prompts.len() * wish.samples;
        let message =
            format!("{count} answers are wanted (prompts times n), but at most {MAX_ANSWERS} are allowed");
        return Err(ApiError::field("n", message));
    }
    if let Format::Grammar(grammar) = format {
        check_grammar(&model, Some(&grammar), format_field).await?;
        parameters.grammar = Some(grammar);
    }
    if parameters.adapter.is_none() {
        parameters.adapter.clone_from(&model.adapter);
    }
    let mut prepared = Vec::with_capacity(prompts.len());
    for input in prompts {
        let request = GenerationRequest {
            model: model.deployment.name.clone(),
            input,
            parameters: parameters.clone(),
            extra_eos: Vec::new(),
            deadline: None,
            tenant: caller.tenant.clone(),
            trace: caller.trace,
            is_read: false,
        };
        prepared.push(services.front.prepare(request).await?);
    }
    let head = Head {
        id: id("cmpl-"),
        object: "text_completion",
        created: unix_time(),
        model: model.deployment.name.clone(),
        system_fingerprint: prepared.first().map(fingerprint).unwrap_or_default(),
    };
    let answers = Answers::start(&services.front, &prepared, wish.samples).await?;
    let mut usage = Usage::default();
    prepared.iter().for_each(|prepared| usage.add_prompt(prepared.valid.prompt.len()));
    let samples: Vec<Sample> = (0..prepared.len() * wish.samples).map(|_| Sample::default()).collect();
    let run = Run { prepared, wish, usage, samples };
    if run.wish.stream {
        return Ok(events::stream(move |events| run.stream(answers, head, events)));
    }
    let (choices, usage) = run.collect(answers).await?;
    Ok(Json(Body { head: &head, choices, usage: Some(Some(usage)) }).into_response())
}

/// Text, token ids, or a list of one of these.
pub(super) fn prompts(fields: &mut Fields, name: &str) -> Result<Vec<Input>, ApiError> {
    let list = match fields.value(name).ok_or_else(|| fields.missing(name))? {
        Value::String(text) => return Ok(vec![Input::Prompt(text)]),
        Value::Array(list) => list,
        other => return Err(wrong(name, &other, "a text, token ids, or a list of these")),
    };
    if list.is_empty() {
        return Err(ApiError::field(name, format!("{name} is an empty list")));
    }
    if list.iter().all(Value::is_number) {
        return Ok(vec![tokens(list, name)?]);
    }
    if list.len() > MAX_PROMPTS {
        let message = format!("{name} has {} entries, but at most {MAX_PROMPTS} are allowed", list.len());
        return Err(ApiError::field(name, message));
    }
    let inputs = list.into_iter().enumerate().map(|(index, value)| match value {
        Value::String(text) => Ok(Input::Prompt(text)),
        Value::Array(ids) => tokens(ids, &format!("{name}[{index}]")),
        other => Err(wrong(&format!("{name}[{index}]"), &other, "a text or token ids")),
    });
    inputs.collect()
}

fn tokens(list: Vec<Value>, path: &str) -> Result<Input, ApiError> {
    if list.len() > MAX_PROMPT_TOKENS {
        return Err(ApiError::field(
            path,
            format!("{path} has {} tokens, more than {MAX_PROMPT_TOKENS}", list.len()),
        ));
    }
    let ids =
        list.iter().enumerate().map(|(index, value)| sampling::token(value, &format!("{path}[{index}]")));
    Ok(Input::Tokens(ids.collect::<Result<_, _>>()?))
}

fn read(mut fields: Fields, defaults: &SamplingDefaults) -> Result<(Parameters, Wish), ApiError> {
    let mut parameters = sampling::parameters(&mut fields, defaults)?;
    let most = 0..=i64::from(u32::MAX);
    let given = fields.integer("max_completion_tokens", most.clone())?;
    let max_tokens = given.or(fields.integer("max_tokens", most)?).unwrap_or(DEFAULT_MAX_TOKENS);
    let echo = fields.boolean("echo")?.unwrap_or_default();
    if max_tokens == 0 && !echo {
        return Err(ApiError::field(
            "max_tokens",
            "max_tokens is 0, which leaves nothing to do without echo",
        ));
    }
    parameters.max_tokens = u32::try_from(max_tokens.max(1)).unwrap_or(u32::MAX);
    // mlx_lm.server has true and false here, OpenAI a number.
    let top = match fields.value("logprobs") {
        None | Some(Value::Bool(false)) => None,
        Some(Value::Bool(true)) => Some(0),
        Some(number) => {
            let mut one = Fields::new("", serde_json::Map::from_iter([("logprobs".to_owned(), number)]));
            one.integer("logprobs", 0..=20)?
        }
    };
    let top = top.and_then(|top| u32::try_from(top).ok());
    parameters.top_logprobs = top;
    parameters.prompt_logprobs = top.filter(|_| echo);
    let wish = Wish {
        samples: sampling::samples(&mut fields)?,
        stream: fields.boolean("stream")?.unwrap_or_default(),
        include_usage: include_usage(&mut fields)?,
        logprobs: top.is_some(),
        echo,
        silent: max_tokens == 0,
    };
    fields.only("best_of", &[1.into()], "answers are not ranked; use n")?;
    fields.only("suffix", &[Value::String(String::new())], "models are not asked to fill gaps")?;
    sampling::without_effect(&mut fields)?;
    fields.finish()?;
    Ok((parameters, wish))
}

/// Everything that runs.
struct Run {
    prepared: Vec<Prepared>,
    wish: Wish,
    usage: Usage,
    samples: Vec<Sample>,
}

/// How far one answer is.
#[derive(Default)]
struct Sample {
    /// The prompt was given back.
    echoed: bool,
    /// Scores of the prompt's tokens, until it is given back.
    scores: Vec<Sampled>,
    /// Characters given so far.
    offset: usize,
}

/// What to give to the client now.
struct Given {
    text: String,
    logprobs: Option<TextLogprobs>,
    finish: Option<&'static str>,
}

impl Run {
    fn take(&mut self, index: usize, event: AnswerEvent) -> Option<Given> {
        let (piece, summary) = match event {
            AnswerEvent::Prompt(scores) => {
                self.samples[index].scores.extend(scores);
                return None;
            }
            AnswerEvent::Piece(piece) => (piece, None),
            AnswerEvent::Ended { piece, summary } => (piece, Some(summary)),
        };
        let prompt = index / self.wish.samples;
        let (prepared, sample) = (&self.prepared[prompt], &mut self.samples[index]);
        let tokenizer = &prepared.text.tokenizer;
        let mut logprobs = self.wish.logprobs.then(TextLogprobs::default);
        let mut text = String::new();
        if self.wish.echo && !sample.echoed {
            sample.echoed = true;
            text = echo(prepared, sample, logprobs.as_mut());
        }
        if !self.wish.silent {
            if let Some(logprobs) = &mut logprobs {
                for sampled in spoken(&piece, prepared) {
                    sample.offset = logprobs.push(tokenizer, sampled, sample.offset);
                }
            }
            text.push_str(&piece.text);
        }
        if let Some(summary) = &summary {
            let mut summary = *summary;
            if self.wish.silent {
                summary.generation_tokens = 0;
            }
            self.usage.add_sample(&summary, 0, index.is_multiple_of(self.wish.samples));
        }
        let finish = summary.map(|summary| match summary.end {
            End::Stop if !self.wish.silent => "stop",
            _ => "length",
        });
        Some(Given { text, logprobs: logprobs.filter(|logprobs| !logprobs.is_empty()), finish })
    }

    async fn collect(mut self, mut answers: Answers) -> Result<(Vec<Choice>, Usage), ApiError> {
        let choice = |index| Choice { index, text: String::new(), logprobs: None, finish_reason: None };
        let mut choices: Vec<Choice> = (0..self.samples.len()).map(choice).collect();
        while let Some((index, event)) = answers.next().await {
            let Some(given) = self.take(index, event?) else { continue };
            let choice = &mut choices[index];
            choice.text.push_str(&given.text);
            if let Some(more) = given.logprobs {
                choice.logprobs.get_or_insert_default().append(more);
            }
            choice.finish_reason = given.finish.or(choice.finish_reason);
        }
        Ok((choices, self.usage))
    }

    async fn stream(mut self, mut answers: Answers, head: Head, events: Events) -> Result<(), Gone> {
        let usage = self.wish.include_usage.then_some(None);
        while let Some((index, event)) = answers.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => return events.data(&error.body(Dialect::OpenAi)).await,
            };
            let Some(Given { text, logprobs, finish }) = self.take(index, event) else { continue };
            if text.is_empty() && logprobs.is_none() && finish.is_none() {
                continue;
            }
            let choices = vec![Choice { index, text, logprobs, finish_reason: finish }];
            events.data(&Body { head: &head, choices, usage }).await?;
        }
        if self.wish.include_usage {
            events.data(&Body { head: &head, choices: Vec::new(), usage: Some(Some(self.usage)) }).await?;
        }
        events.done().await
    }
}

/// The tokens of a piece that are part of the answer: an end token is not.
fn spoken<'a>(piece: &'a Piece, prepared: &'a Prepared) -> impl Iterator<Item = &'a Sampled> {
    let stop_tokens = &prepared.valid.spec.stop_tokens;
    piece
        .tokens
        .iter()
        .filter(move |sampled| piece.end != Some(End::Stop) || !stop_tokens.contains(&sampled.token))
}

/// The prompt's text and, if wished for, its tokens with their scores. The first token has none.
fn echo(prepared: &Prepared, sample: &mut Sample, logprobs: Option<&mut TextLogprobs>) -> String {
    let tokenizer: &Tokenizer = &prepared.text.tokenizer;
    let prompt = &prepared.valid.prompt;
    let text = tokenizer.decode(prompt, true).unwrap_or_default();
    let Some(logprobs) = logprobs else {
        sample.offset = text.chars().count();
        return text;
    };
    let scores = std::mem::take(&mut sample.scores);
    let first = prompt.first().map(|token| Sampled { token: *token, logprob: None, top: Vec::new() });
    for sampled in first.iter().chain(&scores) {
        let next = logprobs.push(tokenizer, sampled, sample.offset);
        // What stands for nothing in the text takes no room in it.
        sample.offset = if tokenizer.is_special(sampled.token) { sample.offset } else { next };
    }
    text
}
