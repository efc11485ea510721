//! Looks at nodes as messages.

use super::{NodeFigures, NodeSeen, StageRates};
use crate::metrics::{LinkSeen, SchedulerSeen, StageSeen};
use mlxnode_proto::v1;
use std::time::Duration;
use tonic::Status;

/// A look at a node, without rates.
pub fn node_seen_to_proto(seen: &NodeSeen) -> v1::NodeFigures {
    v1::NodeFigures {
        node_id: seen.node.to_string(),
        schedulers: seen.schedulers.iter().map(scheduler_to_proto).collect(),
        stages: seen.stages.iter().map(|stage| stage_to_proto(stage, None)).collect(),
        links: seen.links.iter().map(link_to_proto).collect(),
    }
}

/// The same with rates.
pub(crate) fn figures_to_proto(figures: &NodeFigures) -> v1::NodeFigures {
    let rates = figures.rates.iter().copied().chain(std::iter::repeat(None));
    let stages = figures.seen.stages.iter().zip(rates).map(|(stage, rates)| stage_to_proto(stage, rates));
    v1::NodeFigures { stages: stages.collect(), ..node_seen_to_proto(&figures.seen) }
}

/// What another node says about itself.
///
/// # Errors
/// When its id is none.
pub fn node_seen(wire: v1::NodeFigures) -> Result<NodeSeen, Status> {
    let node = wire.node_id.parse().map_err(|error| Status::internal(format!("a node's id: {error}")))?;
    Ok(NodeSeen {
        node,
        schedulers: wire.schedulers.into_iter().map(scheduler).collect(),
        stages: wire.stages.into_iter().map(stage).collect(),
        links: wire.links.into_iter().map(link).collect(),
    })
}

fn scheduler_to_proto(seen: &SchedulerSeen) -> v1::SchedulerFigures {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    v1::SchedulerFigures {
        model: seen.model.clone(),
        running: count(seen.running),
        waiting: count(seen.waiting),
        kv_usage: seen.kv_usage,
        preemptions: seen.preemptions,
        prompt_memory_bytes: seen.prompt_memory_bytes,
        prompt_disk_bytes: seen.prompt_disk_bytes,
    }
}

fn scheduler(wire: v1::SchedulerFigures) -> SchedulerSeen {
    SchedulerSeen {
        model: wire.model,
        running: wire.running as usize,
        waiting: wire.waiting as usize,
        kv_usage: wire.kv_usage,
        preemptions: wire.preemptions,
        prompt_memory_bytes: wire.prompt_memory_bytes,
        prompt_disk_bytes: wire.prompt_disk_bytes,
    }
}

fn stage_to_proto(seen: &StageSeen, rates: Option<StageRates>) -> v1::StageFigures {
    let seconds = |time: Option<Duration>| time.unwrap_or_default().as_secs_f64();
    v1::StageFigures {
        model: seen.model.clone(),
        layers: seen.layers.clone(),
        steps: seen.steps,
        compute_seconds: seen.compute.as_secs_f64(),
        wait_seconds: seconds(seen.wait),
        send_seconds: seconds(seen.send),
        prompt_tokens: seen.prompt_tokens,
        decode_tokens: seen.decode_tokens,
        sent_bytes: seen.sent_bytes,
        guessed_tokens: seen.guessed_tokens,
        accepted_tokens: seen.accepted_tokens,
        open_sequences: seen.open_sequences,
        memory_bytes: seen.active_bytes,
        memory_peak_bytes: seen.peak_bytes,
        rates: rates.map(|rates| v1::StageRates {
            busy: rates.busy,
            compute_seconds: rates.compute_seconds,
            wait_seconds: rates.wait_seconds,
            send_seconds: rates.send_seconds,
            prompt_tokens_per_second: rates.prompt_tokens_per_second,
            tokens_per_second: rates.tokens_per_second,
            sent_bytes_per_second: rates.sent_bytes_per_second,
        }),
    }
}

fn stage(wire: v1::StageFigures) -> StageSeen {
    let time = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
    StageSeen {
        model: wire.model,
        layers: wire.layers,
        steps: wire.steps,
        compute: time(wire.compute_seconds),
        wait: Some(time(wire.wait_seconds)),
        send: Some(time(wire.send_seconds)),
        open_sequences: wire.open_sequences,
        active_bytes: wire.memory_bytes,
        peak_bytes: wire.memory_peak_bytes,
        prompt_tokens: wire.prompt_tokens,
        decode_tokens: wire.decode_tokens,
        sent_bytes: wire.sent_bytes,
        guessed_tokens: wire.guessed_tokens,
        accepted_tokens: wire.accepted_tokens,
        ..StageSeen::default() // histograms are told by each node itself
    }
}

fn link_to_proto(seen: &LinkSeen) -> v1::Link {
    v1::Link {
        to_node_id: seen.to_id.clone(),
        rtt_seconds: seen.round_trip.unwrap_or_default().as_secs_f64(),
    }
}

fn link(wire: v1::Link) -> LinkSeen {
    let round_trip = Duration::try_from_secs_f64(wire.rtt_seconds).ok().filter(|time| !time.is_zero());
    LinkSeen { to: String::new(), to_id: wire.to_node_id, round_trip }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_cluster::NodeId;

    #[test]
    fn a_look_survives_the_way_to_another_node() {
        let seen = NodeSeen {
            node: NodeId::from_bytes([7; 32]),
            schedulers: vec![SchedulerSeen {
                model: "demo".into(),
                running: 1,
                waiting: 2,
                kv_usage: Some(0.5),
                preemptions: 3,
                prompt_memory_bytes: 5,
                prompt_disk_bytes: 6,
            }],
            stages: vec![StageSeen {
                model: "demo".into(),
                layers: "0-4".into(),
                steps: 3,
                compute: Duration::from_millis(500),
                wait: Some(Duration::from_millis(250)),
                send: Some(Duration::from_millis(125)),
                open_sequences: 4,
                active_bytes: 5,
                peak_bytes: 6,
                prompt_tokens: 7,
                decode_tokens: 8,
                sent_bytes: 9,
                guessed_tokens: 10,
                accepted_tokens: 7,
                ..StageSeen::default()
            }],
            links: vec![LinkSeen {
                to: String::new(),
                to_id: NodeId::from_bytes([8; 32]).to_string(),
                round_trip: Some(Duration::from_micros(300)),
            }],
        };
        let arrived = node_seen(node_seen_to_proto(&seen)).unwrap();
        assert_eq!(format!("{arrived:?}"), format!("{seen:?}"));
        assert!(node_seen(v1::NodeFigures { node_id: "x".into(), ..Default::default() }).is_err());
        let odd = v1::StageFigures { compute_seconds: f64::NAN, wait_seconds: -1.0, ..Default::default() };
        assert_eq!(stage(odd).compute, Duration::ZERO);
    }
}
