//! What nodes say to each other: `NodeControl` and `Replica` messages to our types and back.

use mlxnode_cluster::NodeId;
use mlxnode_compute::{ByteCount, LayerRange};
use mlxnode_coordinator::deployments::{Attempt, Links, Shard, StartedWorker};
use mlxnode_coordinator::placement::Guessing;
use mlxnode_coordinator::scheduler::{RunError, RunEvent, RunRequest};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_worker::SampledToken;
use mlxnode_worker::wire::{
    WireError, prompt_tokens, sampled_token_from_proto, sampled_token_to_proto, scores_from_proto,
    scores_to_proto, sequence_spec_from_proto, sequence_spec_to_proto,
};
use tonic::Status;

/// Sequences have no name between a front and a scheduler: the call is the name.
const NAMELESS: mlxnode_compute::SequenceId = mlxnode_compute::SequenceId(0);

pub(crate) fn fence_to_proto(attempt: &Attempt) -> Option<proto::Fence> {
    Some(proto::Fence { generation: 0, epoch: attempt.epoch })
}

pub(crate) fn attempt(deployment: String, fence: Option<proto::Fence>) -> Result<Attempt, Status> {
    let fence = fence.ok_or_else(|| Status::invalid_argument("fence is missing"))?;
    Ok(Attempt { name: deployment, epoch: fence.epoch })
}

pub(crate) fn shard_to_proto(shard: &Shard) -> proto::ShardSpec {
    proto::ShardSpec {
        layer_start: shard.layers.start as u32,
        layer_end: shard.layers.end as u32,
        layer_count: shard.layer_count as u32,
        context_tokens: shard.context_tokens as u32,
        max_sequences: shard.max_sequences as u32,
        prefill_chunk: shard.prefill_chunk as u32,
        prompt_bytes: shard.prompts.0,
        guessing: shard.guessing.as_ref().map(guessing_to_proto),
    }
}

pub(crate) fn shard(shard: Option<proto::ShardSpec>) -> Result<Shard, Status> {
    let shard = shard.ok_or_else(|| Status::invalid_argument("shard is missing"))?;
    Ok(Shard {
        layers: LayerRange::new(shard.layer_start as usize, shard.layer_end as usize),
        layer_count: shard.layer_count as usize,
        context_tokens: shard.context_tokens as usize,
        max_sequences: shard.max_sequences as usize,
        prefill_chunk: shard.prefill_chunk as usize,
        prompts: ByteCount(shard.prompt_bytes),
        guessing: shard.guessing.map(guessing),
    })
}

fn guessing_to_proto(guessing: &Guessing) -> proto::Guessing {
    proto::Guessing {
        draft: guessing.draft.clone().unwrap_or_default(),
        ngram: guessing.ngram as u32,
        tokens: guessing.tokens as u32,
    }
}

fn guessing(guessing: proto::Guessing) -> Guessing {
    Guessing {
        draft: Some(guessing.draft).filter(|draft| !draft.is_empty()),
        ngram: guessing.ngram as usize,
        tokens: guessing.tokens as usize,
    }
}

pub(crate) fn started_to_proto(started: StartedWorker) -> proto::StartedWorker {
    proto::StartedWorker {
        address: started.address,
        key_pin: started.key_pin.to_vec().into(),
        pid: started.pid,
        weight_bytes: started.weights.0,
    }
}

pub(crate) fn started(started: proto::StartedWorker) -> Result<StartedWorker, Status> {
    Ok(StartedWorker {
        key_pin: hash(&started.key_pin)?,
        address: started.address,
        pid: started.pid,
        weights: ByteCount(started.weight_bytes),
    })
}

pub(crate) fn links_to_proto(links: &Links) -> proto::WorkerLinks {
    let neighbour = |end: &Option<(String, [u8; 32])>| {
        let (address, pin) = end.clone()?;
        Some(proto::Neighbour { address, key_pin: pin.to_vec().into() })
    };
    proto::WorkerLinks {
        next: neighbour(&links.next),
        previous: neighbour(&links.previous),
        drivers: links.drivers.iter().map(|node| node.as_bytes().to_vec().into()).collect(),
    }
}

pub(crate) fn links(links: Option<proto::WorkerLinks>) -> Result<Links, Status> {
    let links = links.ok_or_else(|| Status::invalid_argument("links are missing"))?;
    let neighbour = |end: Option<proto::Neighbour>| match end {
        Some(end) => Ok::<_, Status>(Some((end.address, hash(&end.key_pin)?))),
        None => Ok(None),
    };
    Ok(Links {
        next: neighbour(links.next)?,
        previous: neighbour(links.previous)?,
        drivers: links
            .drivers
            .iter()
            .map(|pin| hash(pin).map(NodeId::from_bytes))
            .collect::<Result<_, _>>()?,
    })
}

fn hash(bytes: &[u8]) -> Result<[u8; 32], Status> {
    bytes.try_into().map_err(|_| Status::invalid_argument("a key's hash has 32 bytes"))
}

pub(crate) fn run_to_proto(deployment: &str, run: &RunRequest) -> Result<proto::RunRequest, WireError> {
    Ok(proto::RunRequest {
        deployment: deployment.to_owned(),
        prompt: run.prompt.clone(),
        spec: Some(sequence_spec_to_proto(&run.spec)?),
        tenant: run.tenant.clone(),
        generated: u32::try_from(run.generated())
            .map_err(|_| WireError::TooLarge { name: "generated", value: run.generated() })?,
    })
}

pub(crate) fn run(
    run: proto::RunRequest,
    deadline: Option<std::time::Instant>,
) -> Result<RunRequest, Status> {
    let spec = run.spec.ok_or_else(|| Status::invalid_argument("spec is missing"))?;
    let spec = prompt_tokens(run.prompt.len(), run.generated)
        .and_then(|prompt_tokens| sequence_spec_from_proto(spec, prompt_tokens))
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    Ok(RunRequest { prompt: run.prompt, spec, deadline, tenant: run.tenant })
}

pub(crate) fn run_event_to_proto(event: Result<RunEvent, RunError>) -> Result<proto::RunEvent, Status> {
    use proto::run_event::Event;
    let event = match event {
        Ok(RunEvent::Started { cached_tokens }) => Event::Started(proto::RunStarted {
            cached_tokens: u32::try_from(cached_tokens).unwrap_or(u32::MAX),
        }),
        Ok(RunEvent::Scores { position, scores }) => Event::Scores(
            scores_to_proto(NAMELESS, position, &scores)
                .map_err(|error| Status::internal(error.to_string()))?,
        ),
        Ok(RunEvent::Embedding(values)) => {
            Event::Embedding(proto::Embedding { sequence: NAMELESS.0, values })
        }
        Ok(RunEvent::Token { position, sampled, end }) => {
            let token = SampledToken { sequence: NAMELESS, position, sampled, end };
            Event::Token(sampled_token_to_proto(&token).map_err(|error| Status::internal(error.to_string()))?)
        }
        Err(error) => Event::Failed(run_failed_to_proto(error)),
    };
    Ok(proto::RunEvent { event: Some(event) })
}

pub(crate) fn run_event(event: proto::RunEvent) -> Result<RunEvent, RunError> {
    use proto::run_event::Event;
    match event.event {
        Some(Event::Started(started)) => {
            Ok(RunEvent::Started { cached_tokens: started.cached_tokens as usize })
        }
        Some(Event::Scores(scores)) => {
            let (position, scores) =
                scores_from_proto(scores).map_err(|error| RunError::Failed(error.to_string()))?;
            Ok(RunEvent::Scores { position, scores })
        }
        Some(Event::Embedding(embedding)) => Ok(RunEvent::Embedding(embedding.values)),
        Some(Event::Token(token)) => {
            let token =
                sampled_token_from_proto(token).map_err(|error| RunError::Failed(error.to_string()))?;
            let SampledToken { position, sampled, end, .. } = token;
            Ok(RunEvent::Token { position, sampled, end })
        }
        Some(Event::Failed(failed)) => Err(run_failed(failed)),
        None => {
            Err(RunError::Failed("the scheduler's node sent an event that this release does not know".into()))
        }
    }
}

fn run_failed_to_proto(error: RunError) -> proto::RunFailed {
    use proto::run_failed::Kind;
    let (kind, text, count, limit) = match error {
        RunError::QueueFull { queued, tokens } => (Kind::QueueFull, String::new(), queued, tokens),
        RunError::TooLong { tokens, context } => (Kind::TooLong, String::new(), tokens, context),
        RunError::Invalid(text) => (Kind::Invalid, text, 0, 0),
        RunError::DeadlineExceeded => (Kind::Deadline, String::new(), 0, 0),
        RunError::Cancelled => (Kind::Cancelled, String::new(), 0, 0),
        RunError::Unavailable(text) => (Kind::Unavailable, text, 0, 0),
        RunError::Failed(text) => (Kind::Failed, text, 0, 0),
    };
    proto::RunFailed { kind: kind.into(), text, count: count as u64, limit: limit as u64 }
}

fn run_failed(failed: proto::RunFailed) -> RunError {
    use proto::run_failed::Kind;
    match failed.kind() {
        Kind::QueueFull => {
            RunError::QueueFull { queued: failed.count as usize, tokens: failed.limit as usize }
        }
        Kind::TooLong => RunError::TooLong { tokens: failed.count as usize, context: failed.limit as usize },
        Kind::Invalid => RunError::Invalid(failed.text),
        Kind::Deadline => RunError::DeadlineExceeded,
        Kind::Cancelled => RunError::Cancelled,
        Kind::Unavailable => RunError::Unavailable(failed.text),
        Kind::Failed | Kind::Unspecified => RunError::Failed(failed.text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_fail_survives_the_network() {
        let errors = [
            RunError::QueueFull { queued: 7, tokens: 900 },
            RunError::TooLong { tokens: 9, context: 8 },
            RunError::Invalid("no".into()),
            RunError::DeadlineExceeded,
            RunError::Cancelled,
            RunError::Unavailable("gone".into()),
            RunError::Failed("broken".into()),
        ];
        for error in errors {
            let event = run_event_to_proto(Err(error.clone())).unwrap();
            assert_eq!(run_event(event), Err(error));
        }
    }

    #[test]
    fn links_survive_the_network_and_short_keys_are_refused() {
        let links_here = Links {
            next: Some(("10.0.0.2:4".into(), [7; 32])),
            previous: None,
            drivers: vec![NodeId::from_bytes([9; 32])],
        };
        assert_eq!(links(Some(links_to_proto(&links_here))).unwrap(), links_here);
        let short = proto::WorkerLinks { drivers: vec![vec![1, 2].into()], ..Default::default() };
        assert!(links(Some(short)).is_err());
    }
}
