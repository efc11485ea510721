//! Blocks of prompts between the plain types of the seam and the messages of the contract.

use crate::wire::{WireError, number};
use mlxnode_compute::{
    BlockCapacity, BlockHash, BlockId, BlockOrder, BlockPlan, ByteCount, Keep, SequenceId,
};
use mlxnode_proto::internal::v1 as proto;

/// Most blocks that one message may list: a million tokens.
const MOST_BLOCKS: usize = 4096;

/// None when there is nothing to begin with and nothing to keep.
pub(crate) fn block_plan_to_proto(plan: &BlockPlan) -> Result<Option<proto::BlockPlan>, WireError> {
    if plan.is_empty() {
        return Ok(None);
    }
    let keep = plan.keep.iter().map(|keep| block_keep_to_proto(*keep)).collect::<Result<_, _>>()?;
    Ok(Some(proto::BlockPlan { reuse: plan.reuse.iter().map(|block| block.0).collect(), keep }))
}

pub(crate) fn block_plan_from_proto(plan: Option<proto::BlockPlan>) -> Result<BlockPlan, WireError> {
    let Some(proto::BlockPlan { reuse, keep }) = plan else { return Ok(BlockPlan::default()) };
    for (name, length) in [("reuse", reuse.len()), ("keep", keep.len())] {
        if length > MOST_BLOCKS {
            return Err(WireError::TooLong { name, length });
        }
    }
    Ok(BlockPlan {
        reuse: reuse.into_iter().map(BlockId).collect(),
        keep: keep.iter().map(block_keep_from_proto).collect(),
    })
}

fn block_keep_to_proto(keep: Keep) -> Result<proto::BlockKeep, WireError> {
    let Keep { number: place, block, checkpoint } = keep;
    Ok(proto::BlockKeep { number: number("number", place)?, block: block.0, checkpoint })
}

fn block_keep_from_proto(keep: &proto::BlockKeep) -> Keep {
    Keep { number: keep.number as usize, block: BlockId(keep.block), checkpoint: keep.checkpoint }
}

pub(crate) fn keep_to_proto(sequence: SequenceId, keep: Keep) -> Result<proto::KeepBlock, WireError> {
    Ok(proto::KeepBlock { sequence: sequence.0, keep: Some(block_keep_to_proto(keep)?) })
}

pub(crate) fn keep_from_proto(keep: &proto::KeepBlock) -> Result<(SequenceId, Keep), WireError> {
    let block = keep.keep.as_ref().ok_or(WireError::Missing("the block to keep"))?;
    Ok((SequenceId(keep.sequence), block_keep_from_proto(block)))
}

pub(crate) fn block_order_to_proto(order: BlockOrder) -> proto::BlockOrder {
    use proto::block_order::Order;
    let file =
        |block: BlockId, hash: BlockHash| proto::BlockFile { block: block.0, hash: hash.0.to_vec().into() };
    let order = match order {
        BlockOrder::Drop { block } => Order::Drop(block.0),
        BlockOrder::Spill { block, hash } => Order::Spill(file(block, hash)),
        BlockOrder::Restore { block, hash } => Order::Restore(file(block, hash)),
        BlockOrder::Erase { hash } => Order::Erase(hash.0.to_vec().into()),
    };
    proto::BlockOrder { order: Some(order) }
}

pub(crate) fn block_order_from_proto(order: proto::BlockOrder) -> Result<BlockOrder, WireError> {
    use proto::block_order::Order;
    Ok(match order.order.ok_or(WireError::Missing("what becomes of a block"))? {
        Order::Drop(block) => BlockOrder::Drop { block: BlockId(block) },
        Order::Spill(file) => BlockOrder::Spill { block: BlockId(file.block), hash: hash(&file.hash)? },
        Order::Restore(file) => BlockOrder::Restore { block: BlockId(file.block), hash: hash(&file.hash)? },
        Order::Erase(bytes) => BlockOrder::Erase { hash: hash(&bytes)? },
    })
}

pub(crate) fn capacities_to_proto(capacities: &[BlockCapacity]) -> proto::BlockCapacities {
    let stage = |capacity: &BlockCapacity| proto::BlockCapacity {
        block_bytes: capacity.block.0,
        checkpoint_bytes: capacity.checkpoint.0,
        memory_bytes: capacity.memory.0,
        disk_bytes: capacity.disk.0,
        fingerprint: capacity.fingerprint.to_vec().into(),
    };
    proto::BlockCapacities { stages: capacities.iter().map(stage).collect() }
}

pub(crate) fn capacities_from_proto(
    capacities: &proto::BlockCapacities,
) -> Result<Vec<BlockCapacity>, WireError> {
    if capacities.stages.len() > MOST_BLOCKS {
        return Err(WireError::TooLong { name: "stages", length: capacities.stages.len() });
    }
    let stage = |capacity: &proto::BlockCapacity| {
        Ok(BlockCapacity {
            block: ByteCount(capacity.block_bytes),
            checkpoint: ByteCount(capacity.checkpoint_bytes),
            memory: ByteCount(capacity.memory_bytes),
            disk: ByteCount(capacity.disk_bytes),
            fingerprint: hash(&capacity.fingerprint)?.0,
        })
    };
    capacities.stages.iter().map(stage).collect()
}

fn hash(bytes: &[u8]) -> Result<BlockHash, WireError> {
    let bytes = bytes.try_into().map_err(|_| WireError::Missing("a hash of 32 bytes"))?;
    Ok(BlockHash(bytes))
}
