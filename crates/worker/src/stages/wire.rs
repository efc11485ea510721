//! Between what travels on a lane and the contract's messages: activations and files in pieces, everything else in one.

use crate::collective::state_files::is_plain;
use crate::wire::{dtype_from_proto, dtype_to_proto};
use bytes::{Bytes, BytesMut};
use mlxnode_cluster::KeyPin;
use mlxnode_compute::{Activation, Dtype, StageOrder};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::line_frame::Body;
use mlxnode_proto::internal::v1::line_order::Order;

/// Bytes of one frame.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Numbers of one stage.
pub(super) const MOST_NUMBERS: usize = 1024;

/// Something whole that travels on a lane; of a file, a part.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item {
    Activation {
        micro_batch: u64,
        activation: Activation,
    },
    Order(StageOrder),
    Numbers(Vec<f64>),
    NumbersOfAll(Vec<Vec<f64>>),
    /// A file begins.
    File {
        bytes: u64,
        name: String,
    },
    /// The next bytes of the file, at most [`PIECE_BYTES`].
    Piece(Bytes),
    /// The file ends.
    Hash([u8; 32]),
    Receipt,
}

/// What does not belong on a lane.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LineWireError {
    #[error("the frame has nothing in it")]
    Empty,
    #[error("a frame comes within the hidden vectors of micro-batch {0}")]
    Interrupted(u64),
    #[error("{0} bytes come where none can be, or too many")]
    Bytes(usize),
    #[error("hidden vectors of {rows} x {hidden} are more than may travel")]
    Shape { rows: u64, hidden: u64 },
    #[error("{0}")]
    Dtype(String),
    #[error("a stage gives {0} numbers, but may give {MOST_NUMBERS}")]
    Numbers(usize),
    #[error("{0:?} is no name of a file")]
    Name(String),
    #[error("{0} is not 32 bytes long")]
    Hash(&'static str),
    #[error("there is an update of the micro-batches {first} to {last}")]
    Update { first: u64, last: u64 },
}

/// An item's frames.
pub(super) fn frames(item: Item) -> Vec<proto::LineFrame> {
    let frame = |body| proto::LineFrame { body: Some(body) };
    let one = match item {
        Item::Activation { micro_batch, activation } => {
            let head = proto::LineActivation {
                micro_batch,
                rows: activation.tokens() as u64,
                hidden: activation.hidden() as u64,
                dtype: dtype_to_proto(activation.dtype()).into(),
            };
            let bytes = activation.bytes();
            // Slices share the activation's memory.
            let pieces = (0..bytes.len()).step_by(PIECE_BYTES);
            let pieces = pieces.map(|at| bytes.slice(at..bytes.len().min(at + PIECE_BYTES)));
            return std::iter::once(Body::Activation(head))
                .chain(pieces.map(Body::More))
                .map(frame)
                .collect();
        }
        Item::Order(order) => Body::Order(order_to_proto(&order)),
        Item::Numbers(values) => Body::Numbers(proto::LineNumbers { values }),
        Item::NumbersOfAll(all) => {
            let stages = all.into_iter().map(|values| proto::LineNumbers { values }).collect();
            Body::NumbersOfAll(proto::LineNumbersOfAll { stages })
        }
        Item::File { bytes, name } => Body::File(proto::LineFile { bytes, name }),
        Item::Piece(piece) => Body::More(piece),
        Item::Hash(hash) => Body::FileHash(hash.to_vec().into()),
        Item::Receipt => Body::Receipt(proto::LineReceipt {}),
    };
    vec![frame(one)]
}

fn order_to_proto(order: &StageOrder) -> proto::LineOrder {
    let order = match order {
        StageOrder::Update(range) => {
            Order::Update(proto::LineUpdate { first: *range.start(), last: *range.end() })
        }
        StageOrder::Validate(micro_batch) => Order::Validate(*micro_batch),
        StageOrder::Test => Order::Test(proto::LineTest {}),
        StageOrder::Load => Order::Load(proto::LineLoad {}),
        StageOrder::Save => Order::Save(proto::LineSave {}),
        StageOrder::Publish => Order::Publish(proto::LinePublish {}),
        StageOrder::Finish => Order::Finish(proto::LineFinish {}),
    };
    proto::LineOrder { order: Some(order) }
}

fn order_from_proto(order: proto::LineOrder) -> Result<StageOrder, LineWireError> {
    Ok(match order.order.ok_or(LineWireError::Empty)? {
        Order::Update(proto::LineUpdate { first, last }) if first <= last => StageOrder::Update(first..=last),
        Order::Update(proto::LineUpdate { first, last }) => {
            return Err(LineWireError::Update { first, last });
        }
        Order::Validate(micro_batch) => StageOrder::Validate(micro_batch),
        Order::Test(_) => StageOrder::Test,
        Order::Load(_) => StageOrder::Load,
        Order::Save(_) => StageOrder::Save,
        Order::Publish(_) => StageOrder::Publish,
        Order::Finish(_) => StageOrder::Finish,
    })
}

fn numbers(numbers: proto::LineNumbers) -> Result<Vec<f64>, LineWireError> {
    match numbers.values.len() {
        0..=MOST_NUMBERS => Ok(numbers.values),
        count => Err(LineWireError::Numbers(count)),
    }
}

/// A key's pin from the wire.
pub(super) fn pin(bytes: &[u8]) -> Result<KeyPin, LineWireError> {
    let pin = <[u8; 32]>::try_from(bytes).map_err(|_| LineWireError::Hash("a key's pin"))?;
    Ok(KeyPin::from_bytes(pin))
}

/// Puts the frames of one lane together, and holds at most one activation that is not whole.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    partial: Option<Partial>,
    /// Bytes of the file under way that have not come.
    file: Option<u64>,
}

#[derive(Debug)]
struct Partial {
    micro_batch: u64,
    shape: (usize, usize, Dtype),
    bytes: BytesMut,
    total: usize,
}

impl Assembler {
    /// What is whole with this frame.
    pub(super) fn accept(&mut self, frame: proto::LineFrame) -> Result<Option<Item>, LineWireError> {
        let body = frame.body.ok_or(LineWireError::Empty)?;
        if let Some(partial) = self.partial.take() {
            return match body {
                Body::More(bytes) => self.more(partial, &bytes),
                _ => Err(LineWireError::Interrupted(partial.micro_batch)),
            };
        }
        if let Some(left) = self.file {
            return self.of_file(left, body).map(Some);
        }
        Ok(Some(match body {
            Body::Activation(head) => return self.begin(&head),
            Body::Order(order) => Item::Order(order_from_proto(order)?),
            Body::Numbers(values) => Item::Numbers(numbers(values)?),
            Body::NumbersOfAll(all) => {
                if all.stages.len() > super::MOST_STAGES {
                    return Err(LineWireError::Numbers(all.stages.len().saturating_mul(MOST_NUMBERS)));
                }
                Item::NumbersOfAll(all.stages.into_iter().map(numbers).collect::<Result<_, _>>()?)
            }
            Body::File(proto::LineFile { bytes, name }) => {
                if !is_plain(&name) {
                    return Err(LineWireError::Name(name.chars().take(255).collect()));
                }
                self.file = Some(bytes);
                Item::File { bytes, name }
            }
            Body::Receipt(_) => Item::Receipt,
            Body::More(bytes) => return Err(LineWireError::Bytes(bytes.len())),
            Body::FileHash(_) | Body::Greeting(_) => return Err(LineWireError::Empty),
        }))
    }

    fn begin(&mut self, head: &proto::LineActivation) -> Result<Option<Item>, LineWireError> {
        let proto::LineActivation { micro_batch, rows, hidden, dtype } = *head;
        let dtype = dtype_from_proto(dtype).map_err(|error| LineWireError::Dtype(error.to_string()))?;
        let shape = || Some((usize::try_from(rows).ok()?, usize::try_from(hidden).ok()?));
        let (tokens, width) = shape().ok_or(LineWireError::Shape { rows, hidden })?;
        let total = tokens.checked_mul(width).and_then(|elements| elements.checked_mul(dtype.size()));
        let total = total.filter(|total| *total <= Activation::MAX_BYTES);
        let total = total.ok_or(LineWireError::Shape { rows, hidden })?;
        // Grows as the bytes come: a head alone takes no memory.
        let partial = Partial { micro_batch, shape: (tokens, width, dtype), bytes: BytesMut::new(), total };
        if total == 0 {
            return self.whole(partial).map(Some);
        }
        self.partial = Some(partial);
        Ok(None)
    }

    fn more(&mut self, mut partial: Partial, bytes: &Bytes) -> Result<Option<Item>, LineWireError> {
        let fits = bytes.len() <= partial.total - partial.bytes.len();
        if bytes.is_empty() || bytes.len() > PIECE_BYTES || !fits {
            return Err(LineWireError::Bytes(bytes.len()));
        }
        if partial.bytes.is_empty() {
            partial.bytes.reserve(partial.total);
        }
        partial.bytes.extend_from_slice(bytes);
        if partial.bytes.len() == partial.total {
            return self.whole(partial).map(Some);
        }
        self.partial = Some(partial);
        Ok(None)
    }

    fn whole(&self, partial: Partial) -> Result<Item, LineWireError> {
        let Partial { micro_batch, shape: (rows, hidden, dtype), bytes, .. } = partial;
        let activation = Activation::new(rows, hidden, dtype, bytes.freeze());
        let shape = LineWireError::Shape { rows: rows as u64, hidden: hidden as u64 };
        Ok(Item::Activation { micro_batch, activation: activation.map_err(|_| shape)? })
    }

    fn of_file(&mut self, left: u64, body: Body) -> Result<Item, LineWireError> {
        match body {
            Body::More(bytes) => {
                let length = bytes.len() as u64;
                if bytes.is_empty() || bytes.len() > PIECE_BYTES || length > left {
                    return Err(LineWireError::Bytes(bytes.len()));
                }
                self.file = Some(left - length);
                Ok(Item::Piece(bytes))
            }
            Body::FileHash(hash) if left == 0 => {
                self.file = None;
                let hash = <[u8; 32]>::try_from(&hash[..]).map_err(|_| LineWireError::Hash("a hash"))?;
                Ok(Item::Hash(hash))
            }
            _ => Err(LineWireError::Empty),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn activation(rows: usize) -> Item {
        let bytes: Vec<u8> = (0..rows * 1024 * 4).map(|at| (at % 251) as u8).collect();
        let activation = Activation::new(rows, 1024, Dtype::F32, bytes.into()).unwrap();
        Item::Activation { micro_batch: 7, activation }
    }

    fn file(bytes: u64) -> Item {
        Item::File { bytes, name: "part.safetensors".into() }
    }

    fn assembled(frames: impl IntoIterator<Item = proto::LineFrame>) -> Result<Vec<Item>, LineWireError> {
        let mut assembler = Assembler::default();
        let items = frames.into_iter().map(|frame| assembler.accept(frame)).collect::<Result<Vec<_>, _>>()?;
        Ok(items.into_iter().flatten().collect())
    }

    #[test]
    fn what_is_sent_arrives_in_pieces_of_a_mebibyte() {
        let orders = [
            StageOrder::Update(3..=8),
            StageOrder::Validate(u64::MAX),
            StageOrder::Test,
            StageOrder::Load,
            StageOrder::Save,
            StageOrder::Publish,
            StageOrder::Finish,
        ];
        let mut items: Vec<Item> = orders.into_iter().map(Item::Order).collect();
        items.extend([activation(0), activation(1), activation(256), activation(257), activation(700)]);
        items.extend([
            Item::Numbers(vec![0.1, f64::NEG_INFINITY, -0.0]),
            Item::NumbersOfAll(vec![vec![], vec![1.5; MOST_NUMBERS]]),
            file(3),
            Item::Piece(Bytes::from_static(b"ab")),
            Item::Piece(Bytes::from_static(b"c")),
            Item::Hash([9; 32]),
            file(0),
            Item::Hash([8; 32]),
            Item::Receipt,
        ]);
        let all: Vec<_> = items.iter().cloned().flat_map(frames).collect();
        for frame in &all {
            if let Some(Body::More(bytes)) = &frame.body {
                assert!(bytes.len() <= PIECE_BYTES);
            }
        }
        assert_eq!(assembled(all).unwrap(), items);
        let nan = assembled(frames(Item::Numbers(vec![f64::NAN]))).unwrap();
        assert!(matches!(&nan[..], [Item::Numbers(values)] if values[0].is_nan()));
    }

    #[test]
    fn what_does_not_fit_is_refused_before_it_takes_memory() {
        let frame = |body| proto::LineFrame { body: Some(body) };
        let more = |length: usize| frame(Body::More(vec![0; length].into()));
        let head = |rows, hidden, dtype| {
            frame(Body::Activation(proto::LineActivation { micro_batch: 1, rows, hidden, dtype }))
        };
        let named = |name: &str| frame(Body::File(proto::LineFile { bytes: 1, name: name.into() }));
        let update = Order::Update(proto::LineUpdate { first: 2, last: 1 });
        let wrong = [
            vec![proto::LineFrame { body: None }],
            vec![more(1)],
            vec![head(u64::MAX, 2, 1)],
            vec![head(1 << 20, 1 << 20, 1)],
            vec![head(1, 2, 9)],
            vec![head(1, 2, 1), more(9)],
            vec![head(1, 2, 1), more(0)],
            vec![head(1 << 20, 4, 1), more(PIECE_BYTES + 1)],
            vec![head(1, 2, 1), head(1, 2, 1)],
            vec![frame(Body::Numbers(proto::LineNumbers { values: vec![0.0; MOST_NUMBERS + 1] }))],
            vec![frame(Body::NumbersOfAll(proto::LineNumbersOfAll { stages: vec![Default::default(); 9] }))],
            vec![named("../x")],
            vec![named("")],
            vec![named("a"), more(2)],
            vec![named("a"), frame(Body::FileHash(vec![0; 32].into()))],
            vec![named("a"), more(1), frame(Body::FileHash(vec![0; 31].into()))],
            vec![named("a"), frame(Body::Receipt(proto::LineReceipt {}))],
            vec![frame(Body::FileHash(vec![0; 32].into()))],
            vec![frame(Body::Greeting(proto::LineGreeting::default()))],
            vec![frame(Body::Order(proto::LineOrder { order: None }))],
            vec![frame(Body::Order(proto::LineOrder { order: Some(update) }))],
        ];
        for (place, frames) in wrong.into_iter().enumerate() {
            assert!(assembled(frames).is_err(), "{place}");
        }
    }
}
