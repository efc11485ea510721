//! mlx-lm's classes of caches, and what each is here.

use super::error::Problem;
use super::tree::Node;
use crate::caches::{Contents, KvCache, LayerCache, Order, Planes, Ring, States};
use crate::mixers::Keeps;
use mlxnode_compute::CacheOptions;
use mlxnode_mlx::{Array, Device, Dtype, QuantizationMode, QuantizedLayout};
use std::collections::BTreeMap;

/// Most tokens that a file may claim: positions are 32-bit numbers.
const MOST_TOKENS: i64 = i32::MAX as i64 / 2;

/// One class's state.
pub(super) enum Stored {
    /// Keys and values of some slots.
    Kv(Box<StoredKv>),
    /// What a recurrent mixer keeps.
    States(Vec<Array>),
    /// Several for one layer.
    Several(Vec<Stored>),
    /// Nothing went through.
    Empty,
}

/// Keys and values.
pub(super) struct StoredKv {
    planes: Planes,
    layout: Option<QuantizedLayout>,
    /// How many tokens went through.
    tokens: i64,
    /// At most so many are kept, the first of them for ever, and where the next one goes.
    ring: Option<[i64; 3]>,
    /// Tokens before the first slot.
    start: i64,
}

type Result<T> = std::result::Result<T, Problem>;

/// Understands one cache; `place` is its path in the file.
pub(super) fn understand(class: &str, state: Node, info: Option<&[String]>, place: &str) -> Result<Stored> {
    let mut reader = Reader { items: items(state, place)?, place };
    if let Some(info) = info {
        reader.append(class, info)?;
    }
    match class {
        "KVCache" | "ConcatenateKVCache" => {
            let Some(pair) = reader.pair()? else { return Ok(Stored::Empty) };
            let slots = i64::from(pair[0].dim(2));
            let tokens = if reader.has(2) { reader.whole(2)? } else { slots };
            Ok(kv(pair, tokens, None, 0))
        }
        "RotatingKVCache" => {
            let Some(pair) = reader.pair()? else { return Ok(Stored::Empty) };
            let tokens = reader.whole(2)?;
            Ok(kv(pair, tokens, Some([reader.whole(4)?, reader.whole(3)?, reader.whole(5)?]), 0))
        }
        "ChunkedKVCache" => {
            let Some(pair) = reader.pair()? else { return Ok(Stored::Empty) };
            let start = reader.whole(4)?;
            Ok(kv(pair, reader.whole(2)?, None, start))
        }
        "QuantizedKVCache" | PACKED_RING => {
            let (Some(keys), Some(values)) = (reader.packed(0)?, reader.packed(1)?) else {
                return Ok(Stored::Empty);
            };
            let tokens = reader.whole(2)?;
            let (ring, place) = match class == PACKED_RING {
                true => (Some([reader.whole(4)?, reader.whole(3)?, reader.whole(5)?]), 6),
                false => (None, 3),
            };
            let (group_size, bits) = (reader.whole(place)?, reader.whole(place + 1)?);
            let options = CacheOptions {
                kv_bits: u8::try_from(bits).ok(),
                kv_group_size: usize::try_from(group_size).unwrap_or(0),
                ..CacheOptions::default()
            };
            if options.kv_bits.is_none() || options.check().is_err() {
                return Err(reader.wrong(
                    place,
                    format!("says {bits} bits in groups of {group_size}, which do not exist"),
                ));
            }
            let layout = QuantizedLayout {
                mode: QuantizationMode::Affine,
                bits: bits as i32,
                group_size: group_size as i32,
            };
            let arrays = keys.into_iter().chain(values).collect();
            Ok(Stored::Kv(Box::new(StoredKv {
                planes: Planes { arrays },
                layout: Some(layout),
                tokens,
                ring,
                start: 0,
            })))
        }
        "ArraysCache" | "MambaCache" => {
            let states = match info {
                Some(_) => std::mem::take(&mut reader.items),
                None => {
                    if [1, 2].iter().any(|place| reader.is_something(*place)) {
                        return Err(reader.wrong(1, "says that it holds several sequences".to_owned()));
                    }
                    reader.list(0)?
                }
            };
            let mut arrays = Vec::new();
            let count = states.len();
            for node in states.into_values() {
                if let Node::Array(array) = node {
                    arrays.push(array);
                }
            }
            match arrays.len() {
                0 => Ok(Stored::Empty),
                some if some == count => Ok(Stored::States(arrays)),
                _ => Err(Problem::new(format!("tensor {place}.0"), "holds only some of the states")),
            }
        }
        "CacheList" if info.is_some() => Err(Problem::new(
            format!("note 2.{place}"),
            "is CacheList, of which mlx-lm up to 0.32.0 does not say what is in it; make the file anew",
        )),
        "CacheList" => {
            let mut all = Vec::new();
            for (part, node) in std::mem::take(&mut reader.items) {
                let place = format!("{place}.{part}");
                let mut entry = items(node, &place)?;
                let (state, class) = (entry.remove(&0).unwrap_or(Node::Nothing), entry.remove(&1));
                let Some(Node::Text(class)) = class else {
                    return Err(Problem::new(format!("tensor {place}.1"), "names no class"));
                };
                if class == "CacheList" {
                    return Err(Problem::new(format!("tensor {place}.1"), "is a list in a list"));
                }
                all.push(understand(&class, state, None, &format!("{place}.0"))?);
            }
            Ok(Stored::Several(all))
        }
        _ => Err(Problem::new(
            format!("the class of cache {place}"),
            format!(
                "is {:?}, which holds several sequences or is not known",
                class.chars().take(40).collect::<String>()
            ),
        )),
    }
}

/// A packed cache with a window or a limit, which mlx-lm does not have: keys and values as in QuantizedKVCache, numbers as in
/// RotatingKVCache, then group size and bits.
const PACKED_RING: &str = "RotatingQuantizedKVCache";

fn kv(pair: [Array; 2], tokens: i64, ring: Option<[i64; 3]>, start: i64) -> Stored {
    Stored::Kv(Box::new(StoredKv {
        planes: Planes { arrays: pair.into() },
        layout: None,
        tokens,
        ring,
        start,
    }))
}

fn items(node: Node, place: &str) -> Result<BTreeMap<usize, Node>> {
    match node {
        Node::List(items) => Ok(items),
        Node::Nothing => Ok(BTreeMap::new()),
        _ => Err(Problem::new(format!("tensor {place}"), "is one value where a cache should be")),
    }
}

/// The parts of one cache's state.
struct Reader<'a> {
    items: BTreeMap<usize, Node>,
    place: &'a str,
}

impl Reader<'_> {
    fn wrong(&self, part: usize, problem: String) -> Problem {
        Problem::new(format!("tensor {}.{part}", self.place), problem)
    }

    /// Numbers of a file up to 0.32.0, put where 0.32.2 has them.
    fn append(&mut self, class: &str, info: &[String]) -> Result<()> {
        let field = || format!("note 0.{}", self.place);
        let numbers: std::result::Result<Vec<i64>, _> = info.iter().map(|number| number.parse()).collect();
        let numbers = numbers.map_err(|_| Problem::new(field(), "is not a list of numbers"))?;
        let slots = match self.items.get(&0) {
            Some(Node::Array(array)) => i64::from(array.dim(2)),
            _ => 0,
        };
        // Before September 2025 there was the step by which buffers grow, too.
        let in_order = match (class, numbers.as_slice()) {
            ("RotatingKVCache", [keep, most, tokens, next] | [keep, most, _, tokens, next]) => {
                vec![*tokens, *keep, *most, *next]
            }
            ("QuantizedKVCache", [tokens, group, bits] | [_, tokens, group, bits]) => {
                vec![*tokens, *group, *bits]
            }
            ("ChunkedKVCache", [size, start]) => vec![start.saturating_add(slots), *size, *start],
            ("RotatingKVCache" | "QuantizedKVCache" | "ChunkedKVCache", _) => {
                return Err(Problem::new(
                    field(),
                    format!("has {} numbers, which is not what {class} has", numbers.len()),
                ));
            }
            _ => vec![],
        };
        let numbers =
            in_order.into_iter().enumerate().map(|(place, number)| (place + 2, Node::Whole(number)));
        self.items.extend(numbers);
        Ok(())
    }

    fn has(&self, part: usize) -> bool {
        self.items.contains_key(&part)
    }

    fn is_something(&self, part: usize) -> bool {
        !matches!(self.items.get(&part), None | Some(Node::Nothing))
    }

    fn whole(&self, part: usize) -> Result<i64> {
        match self.items.get(&part) {
            Some(Node::Whole(number)) if (0..=MOST_TOKENS).contains(number) => Ok(*number),
            Some(Node::Whole(number)) => {
                Err(self.wrong(part, format!("is {number}; 0 to {MOST_TOKENS} are possible")))
            }
            _ => Err(self.wrong(part, "is missing or not a number".to_owned())),
        }
    }

    fn list(&mut self, part: usize) -> Result<BTreeMap<usize, Node>> {
        items(self.items.remove(&part).unwrap_or(Node::Nothing), &format!("{}.{part}", self.place))
    }

    /// Keys and values; None when nothing went through.
    fn pair(&mut self) -> Result<Option<[Array; 2]>> {
        match (self.items.remove(&0), self.items.remove(&1)) {
            (Some(Node::Array(keys)), Some(Node::Array(values))) => Ok(Some([keys, values])),
            (None | Some(Node::Nothing), None | Some(Node::Nothing)) => Ok(None),
            _ => Err(self.wrong(0, "has keys without values or values without keys".to_owned())),
        }
    }

    /// Words, scales and biases; None when nothing went through.
    fn packed(&mut self, part: usize) -> Result<Option<[Array; 3]>> {
        let mut parts = self.list(part)?;
        if parts.is_empty() {
            return Ok(None);
        }
        match (parts.remove(&0), parts.remove(&1), parts.remove(&2)) {
            (Some(Node::Array(words)), Some(Node::Array(scales)), Some(Node::Array(biases))) => {
                Ok(Some([words, scales, biases]))
            }
            _ => Err(self.wrong(part, "is not words, scales and biases".to_owned())),
        }
    }
}

/// What a layer remembers, from the classes that a file has for it, and how many tokens went through if it says that.
pub(super) fn layer_cache(
    device: &Device,
    stored: Stored,
    keeps: &Keeps,
    options: &CacheOptions,
    place: usize,
    tokens_noted: Option<i32>,
) -> std::result::Result<(LayerCache, Option<i32>), Failure> {
    let parts = match stored {
        Stored::Several(parts) => parts,
        single => vec![single],
    };
    let fresh = LayerCache::new(options);
    let (mut cache, mut tokens) = (LayerCache::new(options), None);
    let mut kvs =
        [(keeps.kv, fresh.kv), (keeps.indexer, fresh.indexer)].into_iter().filter(|(keeps, _)| *keeps);
    let mut filled = Vec::new();
    for part in parts {
        match part {
            Stored::Kv(stored) => {
                let Some((_, fresh)) = kvs.next() else {
                    return Err(Failure::Foreign(format!("layer {place} keeps no keys and values")));
                };
                let is_indexer = keeps.indexer && !keeps.second && !filled.is_empty();
                let (kv, count) = stored.into_cache(device, fresh, keeps, is_indexer, place)?;
                tokens = Some(count);
                filled.push(kv);
            }
            Stored::States(arrays) if keeps.states => {
                let arrays = with_one_convolution(device, arrays, keeps)?;
                cache.states = States::of(arrays, tokens_noted.unwrap_or(1));
            }
            Stored::States(_) => return Err(Failure::Foreign(format!("layer {place} keeps no states"))),
            Stored::Several(_) => {
                return Err(Failure::Foreign(format!("layer {place} keeps no list of lists")));
            }
            Stored::Empty => {}
        }
    }
    let mut filled = filled.into_iter();
    if let Some(kv) = filled.next() {
        cache.kv = kv;
    }
    if let Some(indexer) = filled.next() {
        cache.indexer = indexer;
    }
    Ok((cache, tokens))
}

/// The states that a file has, with one array for the inputs of all convolutions. Files of our own have had one, too.
fn with_one_convolution(
    device: &Device,
    mut arrays: Vec<Array>,
    keeps: &Keeps,
) -> mlxnode_mlx::Result<Vec<Array>> {
    match keeps.convolutions {
        Some(widths) if arrays.len() > widths.len() => {
            let rest = arrays.split_off(widths.len());
            let joined = device.concatenate(&arrays, -1)?;
            Ok([joined].into_iter().chain(rest).collect())
        }
        _ => Ok(arrays),
    }
}

/// The states as a file has them: an array for the inputs of each convolution.
fn by_convolution(device: &Device, arrays: &[Array], keeps: &Keeps) -> mlxnode_mlx::Result<Vec<Array>> {
    let (Some(widths), Some((joined, rest))) = (keeps.convolutions, arrays.split_first()) else {
        return Ok(arrays.to_vec());
    };
    let mut parts = Vec::with_capacity(arrays.len() + 2);
    let mut start = 0;
    for width in widths {
        parts.push(device.slice_axis(joined, 2, start, start + width, 1)?);
        start += width;
    }
    parts.extend(rest.iter().cloned());
    Ok(parts)
}

/// Why a layer cannot be filled.
pub(super) enum Failure {
    Malformed(Problem),
    Foreign(String),
    Device(mlxnode_mlx::Error),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Malformed(problem)
    }
}

impl From<mlxnode_mlx::Error> for Failure {
    fn from(error: mlxnode_mlx::Error) -> Self {
        Self::Device(error)
    }
}

impl StoredKv {
    fn into_cache(
        self,
        device: &Device,
        fresh: KvCache,
        keeps: &Keeps,
        is_indexer: bool,
        place: usize,
    ) -> std::result::Result<(KvCache, i32), Failure> {
        let wrong = |problem: String| Failure::Malformed(Problem::new(format!("cache {place}"), problem));
        self.check(place)?;
        let slots = i64::from(self.planes.slots());
        let held = slots.min(self.tokens - self.start.min(self.tokens)) as i32;
        let is_complete = self.ring.is_some() || self.start + i64::from(held) == self.tokens;
        if self.tokens == 0 || held == 0 || !is_complete {
            return Err(wrong(format!("has {slots} slots for {} tokens", self.tokens)));
        }
        if let (Some((heads, width)), false) = (keeps.heads, is_indexer) {
            let found = (self.planes.arrays[0].dim(1), self.width());
            if found != (heads, width) {
                return Err(Failure::Foreign(format!(
                    "cache {place} has {} heads of width {}, but the layer has {heads} of width {width}",
                    found.0, found.1
                )));
            }
        }
        let mut planes = self.planes.cut(device, 0, held)?;
        if is_indexer && self.layout.is_none() {
            // There are no values: mlx-lm keeps the keys twice, a cache here has some as narrow as can be.
            let keys = &planes.arrays[0];
            planes.arrays[1] = device.zeros(&[1, keys.dim(1), held, 1], keys.dtype())?;
        }
        let window = if is_indexer { None } else { keeps.window };
        let order = match self.ring {
            None => Order::Line { window },
            Some([most, kept, next]) => {
                let next = if next >= i64::from(held) { held } else { next as i32 };
                if kept >= most || (next < held && (i64::from(next) < kept || i64::from(held) < most)) {
                    return Err(wrong(format!(
                        "keeps {kept} of at most {most} tokens and goes on at slot {next} of {held}"
                    )));
                }
                let ring = Ring::at(most as i32, kept as i32, held, next);
                match window {
                    Some(window) if i64::from(window) <= most => {
                        let parts = ring.in_order(device, &planes, i32::MAX)?;
                        let all = Planes::joined(device, &parts)?;
                        planes = all.cut(device, (held - window).max(0), held)?;
                        Order::Line { window: Some(window) }
                    }
                    _ => Order::Ring(ring),
                }
            }
        };
        let tokens = self.tokens as i32;
        Ok((fresh.filled(Contents { planes, layout: self.layout, tokens, order }), tokens))
    }

    /// Do the arrays belong together?
    fn check(&self, place: usize) -> Result<()> {
        let shape =
            |array: &Array| (array.shape().len() == 4).then(|| [array.dim(0), array.dim(1), array.dim(2)]);
        let first = self.planes.arrays.first().and_then(shape);
        let same = |array: &Array| first.is_some_and(|first| first[0] == 1 && shape(array) == Some(first));
        if !self.planes.arrays.iter().all(same) {
            return Err(Problem::new(
                format!("cache {place}"),
                "has keys and values that are not [1, heads, tokens, width] of the same tokens",
            ));
        }
        let is_float = |array: &Array| matches!(array.dtype(), Dtype::F16 | Dtype::BF16 | Dtype::F32);
        let fits = match (self.layout, self.planes.arrays.as_slice()) {
            (None, [keys, values]) => is_float(keys) && is_float(values),
            (Some(layout), [first, second, third, fourth, fifth, sixth]) => {
                [[first, second, third], [fourth, fifth, sixth]].into_iter().all(|[words, scales, biases]| {
                    let width = i64::from(scales.dim(3)) * i64::from(layout.group_size);
                    words.dtype() == Dtype::U32
                        && is_float(scales)
                        && biases.dtype() == scales.dtype()
                        && biases.dim(3) == scales.dim(3)
                        && i64::from(words.dim(3)) * 32 == width * i64::from(layout.bits)
                })
            }
            _ => false,
        };
        match fits {
            true => Ok(()),
            false => Err(Problem::new(
                format!("cache {place}"),
                "has arrays of other types or widths than its class has",
            )),
        }
    }

    /// Numbers per token and head in the keys.
    fn width(&self) -> i32 {
        match (self.layout, self.planes.arrays.as_slice()) {
            (Some(layout), [_, scales, ..]) => scales.dim(3).saturating_mul(layout.group_size),
            (_, [keys, ..]) => keys.dim(3),
            _ => 0,
        }
    }
}

/// A value to be written.
pub(super) enum Value {
    Array(Array),
    Whole(i32),
    Text(&'static str),
    Nothing,
    List(Vec<Value>),
}

/// The class and the state of what a layer remembers.
pub(super) fn described(
    device: &Device,
    cache: &LayerCache,
    keeps: &Keeps,
) -> mlxnode_mlx::Result<(&'static str, Value)> {
    let mut parts = Vec::new();
    if keeps.states {
        let arrays = by_convolution(device, cache.states.arrays(), keeps)?;
        let arrays = arrays.into_iter().map(Value::Array).collect();
        parts.push(("ArraysCache", Value::List(vec![Value::List(arrays), Value::Nothing, Value::Nothing])));
    }
    if keeps.kv {
        parts.push(described_kv(device, &cache.kv, keeps, Beside::Values)?);
    }
    if keeps.indexer {
        let beside = match (keeps.second, keeps.narrow_index) {
            (true, _) => Beside::Values,
            (false, true) => Beside::Nothing,
            (false, false) => Beside::Keys,
        };
        parts.push(described_kv(device, &cache.indexer, &Keeps::default(), beside)?);
    }
    Ok(match (parts.pop(), parts.is_empty()) {
        (Some(only), true) if !keeps.listed => only,
        (last, _) => {
            let entry = |(class, state)| Value::List(vec![state, Value::Text(class)]);
            ("CacheList", Value::List(parts.into_iter().chain(last).map(entry).collect()))
        }
    })
}

/// What a file has where values stand.
#[derive(Clone, Copy)]
enum Beside {
    Values,
    /// The keys a second time.
    Keys,
    /// As many values as there are keys, without width.
    Nothing,
}

fn described_kv(
    device: &Device,
    cache: &KvCache,
    keeps: &Keeps,
    beside: Beside,
) -> mlxnode_mlx::Result<(&'static str, Value)> {
    let Some(contents) = cache.contents(device)? else {
        return Ok(("KVCache", Value::List(vec![Value::Nothing, Value::Nothing, Value::Whole(0)])));
    };
    let held = contents.planes.slots();
    let array =
        |place: usize| contents.planes.arrays.get(place).cloned().map_or(Value::Nothing, Value::Array);
    let (mut state, is_packed) = match (contents.layout, beside, contents.planes.arrays.first()) {
        (Some(_), ..) => {
            let three = |first: usize| Value::List((first..first + 3).map(array).collect());
            (vec![three(0), three(3)], true)
        }
        (None, Beside::Keys, _) => (vec![array(0), array(0)], false),
        (None, Beside::Nothing, Some(keys)) => {
            let nothing = device.zeros(&[1, keys.dim(1), held, 0], keys.dtype())?;
            (vec![array(0), Value::Array(nothing)], false)
        }
        (None, ..) => (vec![array(0), array(1)], false),
    };
    state.push(Value::Whole(contents.tokens));
    let ring = match &contents.order {
        Order::Ring(ring) => Some([ring.kept(), ring.most(), ring.slot()]),
        Order::Line { window: Some(window) } => Some([0, *window, held]),
        Order::Line { window: None } => None,
    };
    let class = match (ring, keeps.chunk) {
        (Some(_), Some(chunk)) if !is_packed => {
            state.extend([Value::Whole(chunk), Value::Whole(contents.tokens - held)]);
            "ChunkedKVCache"
        }
        (Some(ring), _) => {
            state.extend(ring.map(Value::Whole));
            if is_packed { PACKED_RING } else { "RotatingKVCache" }
        }
        (None, _) if is_packed => "QuantizedKVCache",
        (None, _) => "KVCache",
    };
    if let Some(layout) = contents.layout {
        state.extend([Value::Whole(layout.group_size), Value::Whole(layout.bits)]);
    }
    Ok((class, Value::List(state)))
}
