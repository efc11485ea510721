//! Between the plain types of the seam and the messages of the contract: every conversion in both directions, checked once here.
//!
//! Numbers that are optional in [`Sampling`] travel as zero when absent: a penalty of strength 0 and an XTC of probability 0 change
//! nothing, so nothing is lost.

use crate::blocks_wire::{
    block_order_from_proto, block_order_to_proto, block_plan_from_proto, block_plan_to_proto,
    capacities_from_proto, capacities_to_proto, keep_from_proto, keep_to_proto,
};
use crate::message::{DriveCommand, DriveEvent, RowResult, SampledToken, StageTimes};
use mlxnode_compute::{
    Candidate, Dtype, Grammar, LogprobRequest, Output, Penalty, Sampled, Sampling, SequenceEnd, SequenceId,
    SequenceSpec, TraceContext, Xtc,
};
use mlxnode_proto::internal::v1 as proto;
use std::time::Duration;

/// Most stop tokens, special tokens, biased tokens or candidates that one message may list.
const LONGEST_LIST: usize = 4096;

/// A message that does not say what it must.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// A part that is always there is not.
    #[error("the message lacks {0}")]
    Missing(&'static str),
    /// A list is longer than anyone needs.
    #[error("{name} lists {length} entries, at most {LONGEST_LIST} are accepted")]
    TooLong {
        /// Which list.
        name: &'static str,
        /// Its length.
        length: usize,
    },
    /// A number that names nothing.
    #[error("{name} has the unknown value {value}")]
    Unknown {
        /// Which field.
        name: &'static str,
        /// What came.
        value: i32,
    },
    /// A number that does not fit its field.
    #[error("{name} is {value}, which does not fit 32 bits")]
    TooLarge {
        /// Which field.
        name: &'static str,
        /// What it was.
        value: usize,
    },
}

/// A sequence's parameters for the wire. The prompt's length travels beside them.
pub fn sequence_spec_to_proto(spec: &SequenceSpec) -> Result<proto::SequenceSpec, WireError> {
    let sampling = &spec.sampling;
    let strength = |penalty: &Option<Penalty>| penalty.map_or(0.0, |penalty| penalty.strength);
    let context = |name, penalty: &Option<Penalty>| {
        number(name, penalty.map_or(0, |penalty| penalty.context.min(u32::MAX as usize)))
    };
    let top_logprobs = sampling.logprobs.map(|request| number("top_logprobs", request.top)).transpose()?;
    Ok(proto::SequenceSpec {
        max_tokens: number("max_tokens", spec.max_tokens.min(u32::MAX as usize))?,
        stop_tokens: spec.stop_tokens.clone(),
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        min_tokens_to_keep: number("min_tokens_to_keep", sampling.min_tokens_to_keep)?,
        top_k: number("top_k", sampling.top_k)?,
        xtc_probability: sampling.xtc.as_ref().map_or(0.0, |xtc| xtc.probability),
        xtc_threshold: sampling.xtc.as_ref().map_or(0.0, |xtc| xtc.threshold),
        xtc_special_tokens: sampling.xtc.as_ref().map_or_else(Vec::new, |xtc| xtc.special_tokens.clone()),
        seed: sampling.seed,
        logit_bias: sampling.logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
        repetition_penalty: strength(&sampling.repetition),
        repetition_context_size: context("repetition_context_size", &sampling.repetition)?,
        presence_penalty: strength(&sampling.presence),
        presence_context_size: context("presence_context_size", &sampling.presence)?,
        frequency_penalty: strength(&sampling.frequency),
        frequency_context_size: context("frequency_context_size", &sampling.frequency)?,
        top_logprobs,
        prompt_top_logprobs: spec
            .prompt_logprobs
            .map(|request| number("prompt_top_logprobs", request.top))
            .transpose()?,
        embedding: spec.output == Output::Embedding,
        grammar: spec.grammar.as_ref().map(grammar_to_proto),
        adapter: spec.adapter.clone().unwrap_or_default(),
        most_guesses: spec.most_guesses.map(|most| number("most_guesses", most)).transpose()?,
        traceparent: spec.trace.map(|trace| trace.to_string()).unwrap_or_default(),
    })
}

/// A sequence's parameters from the wire. Ranges are checked by the stage, which knows the vocabulary.
pub fn sequence_spec_from_proto(
    spec: proto::SequenceSpec,
    prompt_tokens: usize,
) -> Result<SequenceSpec, WireError> {
    short("stop_tokens", spec.stop_tokens.len())?;
    short("xtc_special_tokens", spec.xtc_special_tokens.len())?;
    short("logit_bias", spec.logit_bias.len())?;
    let penalty = |strength: f32, context: u32| {
        (strength != 0.0).then_some(Penalty { strength, context: context as usize })
    };
    let xtc = (spec.xtc_probability != 0.0).then_some(Xtc {
        probability: spec.xtc_probability,
        threshold: spec.xtc_threshold,
        special_tokens: spec.xtc_special_tokens,
    });
    Ok(SequenceSpec {
        prompt_tokens,
        max_tokens: spec.max_tokens as usize,
        stop_tokens: spec.stop_tokens,
        sampling: Sampling {
            temperature: spec.temperature,
            top_p: spec.top_p,
            min_p: spec.min_p,
            min_tokens_to_keep: spec.min_tokens_to_keep.max(1) as usize,
            top_k: spec.top_k as usize,
            xtc,
            seed: spec.seed,
            logit_bias: spec.logit_bias.into_iter().collect(),
            repetition: penalty(spec.repetition_penalty, spec.repetition_context_size),
            presence: penalty(spec.presence_penalty, spec.presence_context_size),
            frequency: penalty(spec.frequency_penalty, spec.frequency_context_size),
            logprobs: spec.top_logprobs.map(|top| LogprobRequest { top: top as usize }),
        },
        prompt_logprobs: spec.prompt_top_logprobs.map(|top| LogprobRequest { top: top as usize }),
        output: if spec.embedding { Output::Embedding } else { Output::Tokens },
        grammar: spec.grammar.map(grammar_from_proto).transpose()?,
        adapter: Some(spec.adapter).filter(|adapter| !adapter.is_empty()),
        most_guesses: spec.most_guesses.map(|most| most as usize),
        trace: TraceContext::parse(&spec.traceparent),
    })
}

fn grammar_to_proto(grammar: &Grammar) -> proto::Grammar {
    use proto::grammar::Kind;
    let kind = match grammar {
        Grammar::JsonObject => Kind::JsonObject(true),
        Grammar::JsonSchema(text) => Kind::JsonSchema(text.clone()),
        Grammar::Regex(text) => Kind::Regex(text.clone()),
        Grammar::Lark(text) => Kind::Lark(text.clone()),
    };
    proto::Grammar { kind: Some(kind) }
}

fn grammar_from_proto(grammar: proto::Grammar) -> Result<Grammar, WireError> {
    use proto::grammar::Kind;
    let grammar = match grammar.kind {
        Some(Kind::JsonObject(true)) => Grammar::JsonObject,
        Some(Kind::JsonSchema(text)) => Grammar::JsonSchema(text),
        Some(Kind::Regex(text)) => Grammar::Regex(text),
        Some(Kind::Lark(text)) => Grammar::Lark(text),
        Some(Kind::JsonObject(false)) | None => return Err(WireError::Missing("the kind of grammar")),
    };
    match grammar.text().len() {
        length if length > Grammar::MAX_BYTES => Err(WireError::TooLong { name: "grammar", length }),
        _ => Ok(grammar),
    }
}

/// Scored tokens of a prompt for the wire.
pub fn scores_to_proto(
    sequence: SequenceId,
    position: usize,
    scores: &[Sampled],
) -> Result<proto::PromptScores, WireError> {
    Ok(proto::PromptScores {
        sequence: sequence.0,
        position: number("position", position)?,
        tokens: scores.iter().map(score_to_proto).collect(),
    })
}

fn score_to_proto(score: &Sampled) -> proto::TokenScore {
    let candidate = |it: &Candidate| proto::Candidate { token: it.token, logprob: it.logprob };
    proto::TokenScore {
        token: score.token,
        logprob: score.logprob.unwrap_or(f32::NEG_INFINITY),
        top: score.top.iter().map(candidate).collect(),
    }
}

fn score_from_proto(score: proto::TokenScore) -> Result<Sampled, WireError> {
    short("top", score.top.len())?;
    let top = score.top.into_iter().map(|it| Candidate { token: it.token, logprob: it.logprob });
    Ok(Sampled { token: score.token, logprob: Some(score.logprob), top: top.collect() })
}

/// Scored tokens of a prompt from the wire: the position of the first one, and the tokens.
pub fn scores_from_proto(scores: proto::PromptScores) -> Result<(usize, Vec<Sampled>), WireError> {
    let tokens = scores.tokens.into_iter().map(score_from_proto).collect::<Result<_, _>>()?;
    Ok((scores.position as usize, tokens))
}

/// A sampled token for the wire.
pub fn sampled_token_to_proto(token: &SampledToken) -> Result<proto::SampledToken, WireError> {
    let top = token.sampled.top.iter();
    Ok(proto::SampledToken {
        sequence: token.sequence.0,
        position: number("position", token.position)?,
        token: token.sampled.token,
        logprob: token.sampled.logprob,
        top: top.map(|it| proto::Candidate { token: it.token, logprob: it.logprob }).collect(),
        end: match token.end {
            None => proto::SequenceEnd::None,
            Some(SequenceEnd::Stop) => proto::SequenceEnd::Stop,
            Some(SequenceEnd::Length) => proto::SequenceEnd::Length,
            Some(SequenceEnd::Complete) => proto::SequenceEnd::Complete,
        } as i32,
    })
}

/// A sampled token from the wire.
pub fn sampled_token_from_proto(token: proto::SampledToken) -> Result<SampledToken, WireError> {
    short("top", token.top.len())?;
    let end = match proto::SequenceEnd::try_from(token.end) {
        Ok(proto::SequenceEnd::None) => None,
        Ok(proto::SequenceEnd::Stop) => Some(SequenceEnd::Stop),
        Ok(proto::SequenceEnd::Length) => Some(SequenceEnd::Length),
        Ok(proto::SequenceEnd::Complete) => Some(SequenceEnd::Complete),
        Err(_) => return Err(WireError::Unknown { name: "end", value: token.end }),
    };
    let top = token.top.into_iter().map(|it| Candidate { token: it.token, logprob: it.logprob }).collect();
    let sampled = Sampled { token: token.token, logprob: token.logprob, top };
    Ok(SampledToken { sequence: SequenceId(token.sequence), position: token.position as usize, sampled, end })
}

/// What became of a row, for the wire.
pub(crate) fn row_result_to_proto(row: &RowResult) -> Result<proto::RowResult, WireError> {
    let (sequence, position) = (row.sequence, row.position);
    let tokens = row.token.iter().chain(&row.further).cloned();
    let mut tokens = (position..).zip(tokens).map(|(position, (sampled, end))| SampledToken {
        sequence,
        position,
        sampled,
        end,
    });
    let token = tokens.next();
    Ok(proto::RowResult {
        sequence: sequence.0,
        position: number("position", position)?,
        token: token.as_ref().map(sampled_token_to_proto).transpose()?,
        further: tokens.map(|token| sampled_token_to_proto(&token)).collect::<Result<_, _>>()?,
        scores: row.scores.iter().map(score_to_proto).collect(),
        embedding: row
            .embedding
            .as_ref()
            .map(|values| proto::Embedding { sequence: sequence.0, values: values.clone() }),
    })
}

/// What became of a row, from the wire.
pub(crate) fn row_result_from_proto(row: proto::RowResult) -> Result<RowResult, WireError> {
    let token = row.token.map(sampled_token_from_proto).transpose()?;
    short("further", row.further.len())?;
    let further = row.further.into_iter().map(sampled_token_from_proto).collect::<Result<Vec<_>, _>>()?;
    Ok(RowResult {
        sequence: SequenceId(row.sequence),
        position: row.position as usize,
        token: token.map(|token| (token.sampled, token.end)),
        further: further.into_iter().map(|token| (token.sampled, token.end)).collect(),
        scores: row.scores.into_iter().map(score_from_proto).collect::<Result<_, _>>()?,
        embedding: row.embedding.map(|embedding| embedding.values),
    })
}

/// Times for the wire.
pub(crate) fn times_to_proto(times: &[StageTimes]) -> Vec<proto::StageTimes> {
    let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
    let stage = |times: &StageTimes| proto::StageTimes {
        compute: micros(times.compute),
        wait: micros(times.wait),
        send: micros(times.send),
    };
    times.iter().map(stage).collect()
}

/// Times from the wire.
pub(crate) fn times_from_proto(times: &[proto::StageTimes]) -> Result<Vec<StageTimes>, WireError> {
    short("times", times.len())?;
    let micros = |time: u32| Duration::from_micros(u64::from(time));
    let stage = |times: &proto::StageTimes| StageTimes {
        compute: micros(times.compute),
        wait: micros(times.wait),
        send: micros(times.send),
    };
    Ok(times.iter().map(stage).collect())
}

/// An element type for the wire.
pub fn dtype_to_proto(dtype: Dtype) -> proto::Dtype {
    match dtype {
        Dtype::F32 => proto::Dtype::F32,
        Dtype::F16 => proto::Dtype::F16,
        Dtype::BF16 => proto::Dtype::Bf16,
    }
}

/// An element type from the wire.
pub fn dtype_from_proto(dtype: i32) -> Result<Dtype, WireError> {
    match proto::Dtype::try_from(dtype) {
        Ok(proto::Dtype::F32) => Ok(Dtype::F32),
        Ok(proto::Dtype::F16) => Ok(Dtype::F16),
        Ok(proto::Dtype::Bf16) => Ok(Dtype::BF16),
        Ok(proto::Dtype::Unspecified) | Err(_) => Err(WireError::Unknown { name: "dtype", value: dtype }),
    }
}

/// A scheduler's command for the wire.
pub fn drive_command_to_proto(command: DriveCommand) -> Result<proto::DriveCommand, WireError> {
    let command = match command {
        DriveCommand::Open { sequence, prompt, spec, blocks } => {
            let generated = number("generated", prompt.len().saturating_sub(spec.prompt_tokens))?;
            let spec = Some(sequence_spec_to_proto(&spec)?);
            let blocks = block_plan_to_proto(&blocks)?;
            proto::drive_command::Command::Open(proto::DriveOpen {
                sequence: sequence.0,
                prompt,
                spec,
                blocks,
                generated,
            })
        }
        DriveCommand::Keep { sequence, keep } => {
            proto::drive_command::Command::Keep(keep_to_proto(sequence, keep)?)
        }
        DriveCommand::Blocks(order) => proto::drive_command::Command::Blocks(block_order_to_proto(order)),
        DriveCommand::Cancel { sequence } => {
            proto::drive_command::Command::Cancel(proto::CloseSequence { sequence: sequence.0 })
        }
    };
    Ok(proto::DriveCommand { command: Some(command) })
}

/// A scheduler's command from the wire.
pub fn drive_command_from_proto(command: proto::DriveCommand) -> Result<DriveCommand, WireError> {
    match command.command.ok_or(WireError::Missing("a command"))? {
        proto::drive_command::Command::Open(open) => {
            let spec = open.spec.ok_or(WireError::Missing("the sequence's parameters"))?;
            let prompt_tokens = prompt_tokens(open.prompt.len(), open.generated)?;
            let spec = sequence_spec_from_proto(spec, prompt_tokens)?;
            let (sequence, blocks) = (SequenceId(open.sequence), block_plan_from_proto(open.blocks)?);
            Ok(DriveCommand::Open { sequence, prompt: open.prompt, spec, blocks })
        }
        proto::drive_command::Command::Keep(keep) => {
            let (sequence, keep) = keep_from_proto(&keep)?;
            Ok(DriveCommand::Keep { sequence, keep })
        }
        proto::drive_command::Command::Blocks(order) => {
            Ok(DriveCommand::Blocks(block_order_from_proto(order)?))
        }
        proto::drive_command::Command::Cancel(close) => {
            Ok(DriveCommand::Cancel { sequence: SequenceId(close.sequence) })
        }
    }
}

/// Tokens of the first prompt, in one of `length` whose last ones were generated.
///
/// # Errors
/// When nothing is left of it.
pub fn prompt_tokens(length: usize, generated: u32) -> Result<usize, WireError> {
    let generated = generated as usize;
    match length.checked_sub(generated) {
        // An empty prompt is refused where all prompts are.
        Some(prompt_tokens) if prompt_tokens > 0 || generated == 0 => Ok(prompt_tokens),
        _ => Err(WireError::TooLarge { name: "generated", value: generated }),
    }
}

/// An event of the first stage for the wire.
pub fn drive_event_to_proto(event: &DriveEvent) -> Result<proto::DriveEvent, WireError> {
    use proto::drive_event::Event;
    let event = match event {
        DriveEvent::Started { sequence, cached_tokens } => Event::Started(proto::DriveStarted {
            sequence: sequence.0,
            cached_tokens: number("cached_tokens", *cached_tokens)?,
        }),
        DriveEvent::Capacity { stages } => Event::Capacities(capacities_to_proto(stages)),
        DriveEvent::Progress { sequence, tokens } => {
            Event::Progress(proto::DriveProgress { sequence: sequence.0, tokens: number("tokens", *tokens)? })
        }
        DriveEvent::Missing { sequence } => Event::Missing(proto::CloseSequence { sequence: sequence.0 }),
        DriveEvent::Scores { sequence, position, scores } => {
            Event::Scores(scores_to_proto(*sequence, *position, scores)?)
        }
        DriveEvent::Embedding { sequence, values } => {
            Event::Embedding(proto::Embedding { sequence: sequence.0, values: values.clone() })
        }
        DriveEvent::Token(token) => Event::Token(sampled_token_to_proto(token)?),
        DriveEvent::Closed { sequence } => Event::Closed(proto::CloseSequence { sequence: sequence.0 }),
        DriveEvent::Failed { sequence, reason } => {
            Event::Failed(proto::SequenceFailed { sequence: sequence.0, reason: reason.clone() })
        }
    };
    Ok(proto::DriveEvent { event: Some(event) })
}

/// An event of the first stage from the wire.
pub fn drive_event_from_proto(event: proto::DriveEvent) -> Result<DriveEvent, WireError> {
    use proto::drive_event::Event;
    Ok(match event.event.ok_or(WireError::Missing("an event"))? {
        Event::Started(started) => DriveEvent::Started {
            sequence: SequenceId(started.sequence),
            cached_tokens: started.cached_tokens as usize,
        },
        Event::Capacities(capacities) => DriveEvent::Capacity { stages: capacities_from_proto(&capacities)? },
        Event::Progress(progress) => {
            DriveEvent::Progress { sequence: SequenceId(progress.sequence), tokens: progress.tokens as usize }
        }
        Event::Missing(missing) => DriveEvent::Missing { sequence: SequenceId(missing.sequence) },
        Event::Scores(scores) => {
            let sequence = SequenceId(scores.sequence);
            let (position, scores) = scores_from_proto(scores)?;
            DriveEvent::Scores { sequence, position, scores }
        }
        Event::Embedding(embedding) => {
            DriveEvent::Embedding { sequence: SequenceId(embedding.sequence), values: embedding.values }
        }
        Event::Token(token) => DriveEvent::Token(sampled_token_from_proto(token)?),
        Event::Closed(closed) => DriveEvent::Closed { sequence: SequenceId(closed.sequence) },
        Event::Failed(failed) => {
            DriveEvent::Failed { sequence: SequenceId(failed.sequence), reason: failed.reason }
        }
    })
}

/// `value` as the 32 bits that the wire has for it.
pub(crate) fn number(name: &'static str, value: usize) -> Result<u32, WireError> {
    u32::try_from(value).map_err(|_| WireError::TooLarge { name, value })
}

fn short(name: &'static str, length: usize) -> Result<(), WireError> {
    if length > LONGEST_LIST { Err(WireError::TooLong { name, length }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_compute::{BlockCapacity, BlockHash, BlockId, BlockOrder, BlockPlan, ByteCount, Keep};

    fn rich_spec() -> SequenceSpec {
        SequenceSpec {
            prompt_tokens: 3,
            max_tokens: 17,
            stop_tokens: vec![2, 9],
            sampling: Sampling {
                temperature: 0.7,
                top_p: 0.9,
                min_p: 0.05,
                min_tokens_to_keep: 2,
                top_k: 40,
                xtc: Some(Xtc { probability: 0.5, threshold: 0.1, special_tokens: vec![1] }),
                seed: u64::MAX,
                logit_bias: [(5, -1.5), (7, 2.0)].into(),
                repetition: Some(Penalty { strength: 1.1, context: 20 }),
                presence: Some(Penalty { strength: 0.2, context: 30 }),
                frequency: Some(Penalty { strength: -0.3, context: 40 }),
                logprobs: Some(LogprobRequest { top: 3 }),
            },
            prompt_logprobs: Some(LogprobRequest { top: 0 }),
            most_guesses: Some(2),
            output: Output::Embedding,
            grammar: Some(Grammar::Regex("a|b".into())),
            adapter: Some("poet".into()),
            trace: Some(TraceContext::new([9; 24])),
        }
    }

    #[test]
    fn commands_survive_the_wire() {
        let greedy = SequenceSpec {
            grammar: Some(Grammar::JsonObject),
            ..SequenceSpec::new(3, 17, Sampling::default())
        };
        let keep = Keep { number: 3, block: BlockId(7), checkpoint: true };
        let commands = [
            DriveCommand::Open {
                sequence: SequenceId(4),
                prompt: vec![1, 2, 3],
                spec: rich_spec(),
                blocks: BlockPlan { reuse: vec![BlockId(1)], keep: vec![keep] },
            },
            DriveCommand::Keep { sequence: SequenceId(4), keep },
            DriveCommand::Blocks(BlockOrder::Erase { hash: BlockHash([3; 32]) }),
            DriveCommand::Open {
                sequence: SequenceId(5),
                prompt: vec![0, 0, 0],
                spec: greedy,
                blocks: BlockPlan::default(),
            },
            // Continued: three of these were generated before.
            DriveCommand::Open {
                sequence: SequenceId(6),
                prompt: vec![1, 2, 3, 4, 5, 6],
                spec: rich_spec(),
                blocks: BlockPlan::default(),
            },
            DriveCommand::Cancel { sequence: SequenceId(u64::MAX) },
        ];
        for command in commands {
            let wire = drive_command_to_proto(command.clone()).unwrap();
            assert_eq!(drive_command_from_proto(wire), Ok(command));
        }
    }

    #[test]
    fn more_generated_than_there_is_of_the_prompt_is_refused() {
        for (length, generated) in [(0, 1), (3, 3), (3, u32::MAX)] {
            let error = prompt_tokens(length, generated).unwrap_err();
            assert_eq!(error, WireError::TooLarge { name: "generated", value: generated as usize });
        }
        assert_eq!((prompt_tokens(0, 0), prompt_tokens(3, 2)), (Ok(0), Ok(1)));
    }

    #[test]
    fn events_survive_the_wire() {
        let sequence = SequenceId(8);
        let sampled = Sampled {
            token: 3,
            logprob: Some(-0.5),
            top: vec![Candidate { token: 3, logprob: -0.5 }, Candidate { token: 1, logprob: -2.0 }],
        };
        let mut events = vec![
            DriveEvent::Started { sequence, cached_tokens: 256 },
            DriveEvent::Scores { sequence, position: 1, scores: vec![sampled.clone()] },
            DriveEvent::Embedding { sequence, values: vec![0.5, -1.0] },
            DriveEvent::Capacity {
                stages: vec![BlockCapacity { memory: ByteCount(5), ..BlockCapacity::default() }; 2],
            },
            DriveEvent::Progress { sequence, tokens: 512 },
            DriveEvent::Missing { sequence },
            DriveEvent::Closed { sequence },
            DriveEvent::Failed { sequence, reason: "why".into() },
        ];
        let ends = [SequenceEnd::Stop, SequenceEnd::Complete, SequenceEnd::Length].map(Some);
        for end in ends.into_iter().chain([None]) {
            let sampled = sampled.clone();
            events.push(DriveEvent::Token(SampledToken { sequence, position: 12, sampled, end }));
        }
        for event in events {
            assert_eq!(drive_event_from_proto(drive_event_to_proto(&event).unwrap()), Ok(event));
        }
    }

    #[test]
    fn says_what_a_message_lacks() {
        let empty = proto::DriveCommand { command: None };
        assert_eq!(drive_command_from_proto(empty), Err(WireError::Missing("a command")));
        assert_eq!(dtype_from_proto(0), Err(WireError::Unknown { name: "dtype", value: 0 }));
        assert_eq!(dtype_from_proto(9), Err(WireError::Unknown { name: "dtype", value: 9 }));
        let token = proto::SampledToken { end: 7, ..Default::default() };
        assert_eq!(sampled_token_from_proto(token), Err(WireError::Unknown { name: "end", value: 7 }));
        let spec = proto::SequenceSpec { stop_tokens: vec![0; 5000], ..Default::default() };
        let error = sequence_spec_from_proto(spec, 1).unwrap_err();
        assert_eq!(error, WireError::TooLong { name: "stop_tokens", length: 5000 });
    }
}
