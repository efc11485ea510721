//! Between the group's types and the contract's messages.

use super::client::GroupPeer;
use mlxnode_cluster::KeyPin;
use mlxnode_collective::{CatchUp, Formation, Frame, MemberId, Order, Report};
use mlxnode_compute::{Tally, TreeNode};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::exchange_frame::Body;
use mlxnode_proto::internal::v1::group_member::CatchUp as CatchUpProto;
use mlxnode_proto::internal::v1::group_order::Order as OrderProto;
use mlxnode_proto::internal::v1::group_report::Report as ReportProto;
use std::collections::BTreeMap;

/// A message that lacks what it must have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CollectiveWireError {
    #[error("the message has no {0}")]
    Missing(&'static str),
    #[error("{0} is not 32 bytes long")]
    Hash(&'static str),
    #[error("a value's offset of {0} does not fit this machine")]
    Offset(u64),
    #[error("a formation has {0} members")]
    Members(usize),
}

pub(super) fn frame_to_proto(frame: Frame) -> proto::ExchangeFrame {
    let body = match frame {
        Frame::Part { step, node, offset, values } => Body::Part(proto::ExchangePart {
            step,
            start: node.start,
            end: node.end,
            offset: offset as u64,
            values,
        }),
        Frame::Tally { step, node, tally } => Body::Tally(proto::ExchangeTally {
            step,
            start: node.start,
            end: node.end,
            loss: tally.loss,
            tokens: tally.tokens,
        }),
        Frame::Idle { step } => Body::Idle(step),
        Frame::Sum { step, offset, values } => {
            Body::Sum(proto::ExchangeSum { step, offset: offset as u64, values })
        }
    };
    proto::ExchangeFrame { body: Some(body) }
}

pub(super) fn frame_from_proto(frame: proto::ExchangeFrame) -> Result<Frame, CollectiveWireError> {
    let offset = |offset| usize::try_from(offset).map_err(|_| CollectiveWireError::Offset(offset));
    Ok(match frame.body {
        Some(Body::Part(proto::ExchangePart { step, start, end, offset: at, values })) => {
            Frame::Part { step, node: TreeNode { start, end }, offset: offset(at)?, values }
        }
        Some(Body::Tally(proto::ExchangeTally { step, start, end, loss, tokens })) => {
            Frame::Tally { step, node: TreeNode { start, end }, tally: Tally { loss, tokens } }
        }
        Some(Body::Idle(step)) => Frame::Idle { step },
        Some(Body::Sum(proto::ExchangeSum { step, offset: at, values })) => {
            Frame::Sum { step, offset: offset(at)?, values }
        }
        Some(Body::Greeting(_)) | None => return Err(CollectiveWireError::Missing("gradient")),
    })
}

pub(super) fn greeting_to_proto(epoch: u64, member: MemberId) -> proto::ExchangeFrame {
    let greeting = proto::ExchangeGreeting { epoch, member: member.0 };
    proto::ExchangeFrame { body: Some(Body::Greeting(greeting)) }
}

pub(super) fn report_to_proto(report: Report) -> proto::GroupReport {
    let report = match report {
        Report::Ready { position } => ReportProto::Ready(proto::GroupReady { position }),
        Report::Halted { epoch, position, holds_sum, contributed } => {
            ReportProto::Halted(proto::GroupHalted { epoch, position, holds_sum, contributed })
        }
        Report::Applied { epoch, step, hash } => {
            ReportProto::Applied(proto::GroupApplied { epoch, step, hash: hash.to_vec().into() })
        }
        Report::Parameters { updates, hash } => {
            ReportProto::Parameters(proto::GroupParameters { updates, hash: hash.to_vec().into() })
        }
        Report::Broken { epoch, peer, reason } => {
            ReportProto::Broken(proto::GroupBroken { epoch, peer: peer.0, reason })
        }
    };
    proto::GroupReport { report: Some(report) }
}

pub(super) fn report_from_proto(report: proto::GroupReport) -> Result<Report, CollectiveWireError> {
    Ok(match report.report.ok_or(CollectiveWireError::Missing("report"))? {
        ReportProto::Ready(proto::GroupReady { position }) => Report::Ready { position },
        ReportProto::Halted(proto::GroupHalted { epoch, position, holds_sum, contributed }) => {
            Report::Halted { epoch, position, holds_sum, contributed }
        }
        ReportProto::Applied(proto::GroupApplied { epoch, step, hash }) => {
            Report::Applied { epoch, step, hash: hash_from(&hash)? }
        }
        ReportProto::Parameters(proto::GroupParameters { updates, hash }) => {
            Report::Parameters { updates, hash: hash_from(&hash)? }
        }
        ReportProto::Broken(proto::GroupBroken { epoch, peer, reason }) => {
            Report::Broken { epoch, peer: MemberId(peer), reason }
        }
    })
}

fn hash_from(bytes: &[u8]) -> Result<[u8; 32], CollectiveWireError> {
    <[u8; 32]>::try_from(bytes).map_err(|_| CollectiveWireError::Hash("the hash"))
}

pub(super) fn halt_to_proto(epoch: u64, at: u64) -> proto::GroupOrder {
    proto::GroupOrder { order: Some(OrderProto::Halt(proto::GroupHalt { epoch, at })) }
}

/// `None` when a member's address is not known.
pub(super) fn formation_to_proto(
    formation: &Formation,
    peers: &BTreeMap<MemberId, GroupPeer>,
) -> Option<proto::GroupOrder> {
    let member = |order: &Order| {
        let peer = peers.get(&order.member)?;
        Some(proto::GroupMember {
            member: order.member.0,
            address: peer.address.clone(),
            key_pin: peer.key_pin.as_bytes().to_vec().into(),
            catch_up: match order.catch_up {
                CatchUp::Nothing => None,
                CatchUp::Sum(from) => Some(CatchUpProto::SumFrom(from.0)),
                CatchUp::State(from) => Some(CatchUpProto::StateFrom(from.0)),
            },
        })
    };
    let members = formation.members.iter().map(member).collect::<Option<_>>()?;
    let form = proto::GroupFormation { epoch: formation.epoch, step: formation.step, members };
    Some(proto::GroupOrder { order: Some(OrderProto::Form(form)) })
}

/// The formation, and where its members are.
pub(super) fn formation_from_proto(
    form: proto::GroupFormation,
) -> Result<(Formation, BTreeMap<MemberId, GroupPeer>), CollectiveWireError> {
    if form.members.len() > mlxnode_collective::MOST_MEMBERS {
        return Err(CollectiveWireError::Members(form.members.len()));
    }
    let mut peers = BTreeMap::new();
    let mut members = Vec::new();
    for proto::GroupMember { member, address, key_pin, catch_up } in form.members {
        let pin = <[u8; 32]>::try_from(&key_pin[..]).map_err(|_| CollectiveWireError::Hash("a key's pin"))?;
        let member = MemberId(member);
        peers.insert(member, GroupPeer { address, key_pin: KeyPin::from_bytes(pin) });
        let catch_up = match catch_up {
            None => CatchUp::Nothing,
            Some(CatchUpProto::SumFrom(from)) => CatchUp::Sum(MemberId(from)),
            Some(CatchUpProto::StateFrom(from)) => CatchUp::State(MemberId(from)),
        };
        members.push(Order { member, catch_up });
    }
    Ok((Formation { epoch: form.epoch, step: form.step, members }, peers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_reports_and_formations_come_back_as_they_were() {
        let node = TreeNode { start: 2, end: 4 };
        let values = bytes::Bytes::from_static(b"12345678");
        for frame in [
            Frame::Part { step: 3, node, offset: 9, values: values.clone() },
            Frame::Tally { step: 3, node, tally: Tally { loss: 0.25, tokens: 7 } },
            Frame::Idle { step: 3 },
            Frame::Sum { step: 3, offset: 1, values },
        ] {
            assert_eq!(frame_from_proto(frame_to_proto(frame.clone())), Ok(frame));
        }
        assert!(frame_from_proto(greeting_to_proto(1, MemberId(1))).is_err());
        for report in [
            Report::Ready { position: 4 },
            Report::Halted { epoch: 1, position: 2, holds_sum: true, contributed: false },
            Report::Applied { epoch: 1, step: 2, hash: [7; 32] },
            Report::Parameters { updates: 50, hash: [8; 32] },
            Report::Broken { epoch: 1, peer: MemberId(9), reason: "gone".into() },
        ] {
            assert_eq!(report_from_proto(report_to_proto(report.clone())), Ok(report));
        }
        let peer = |byte| GroupPeer { address: "a:1".into(), key_pin: KeyPin::from_bytes([byte; 32]) };
        let peers = BTreeMap::from([(MemberId(1), peer(1)), (MemberId(2), peer(2)), (MemberId(3), peer(3))]);
        let members = [CatchUp::Nothing, CatchUp::Sum(MemberId(1)), CatchUp::State(MemberId(1))];
        let members =
            (1..).map(MemberId).zip(members).map(|(member, catch_up)| Order { member, catch_up }).collect();
        let formation = Formation { epoch: 5, step: 6, members };
        let Some(OrderProto::Form(form)) = formation_to_proto(&formation, &peers).unwrap().order else {
            panic!("a formation")
        };
        assert_eq!(formation_from_proto(form.clone()), Ok((formation, peers)));
        let mut many = form.clone();
        many.members = vec![form.members[0].clone(); 9];
        assert_eq!(formation_from_proto(many).unwrap_err(), CollectiveWireError::Members(9));
        let mut short = form;
        short.members[0].key_pin = vec![1; 31].into();
        assert!(matches!(formation_from_proto(short), Err(CollectiveWireError::Hash(_))));
    }
}
