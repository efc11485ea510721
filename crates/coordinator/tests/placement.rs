//! Placement against brute force, and its promises on random models and clusters.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a failing test is supposed to stop"
)]

use mlxnode_checkpoint::ModelProfile;
use mlxnode_compute::{ByteCount, Dtype, LayerRange};
use mlxnode_coordinator::NodeId;
use mlxnode_coordinator::placement::{
    LayerCost, ModelCost, Offer, Plan, Refusal, Shortage, WORKER_RESERVE, Wish, plan,
};
use proptest::prelude::*;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn node(number: u8) -> NodeId {
    NodeId::from_bytes([number; 32])
}

fn offer(number: u8, free_mib: u64) -> Offer {
    Offer {
        node: node(number),
        name: format!("mac-{number}"),
        budget: ByteCount((free_mib + 100) * MIB),
        used: ByteCount(100 * MIB),
        prompts: ByteCount(0),
        bytes_per_second: None,
        coordinator: number == 0,
        round_trips: [].into(),
    }
}

fn offers(free_mib: &[u64]) -> Vec<Offer> {
    free_mib.iter().enumerate().map(|(number, free)| offer(number as u8, *free)).collect()
}

/// Layers of so many MiB, embedding and head of 10 MiB, no KV cache.
fn model(layers_mib: &[u64]) -> ModelCost {
    ModelCost {
        architecture: "llama".into(),
        layers: layers_mib
            .iter()
            .map(|mib| LayerCost {
                weights: ByteCount(mib * MIB),
                kv_per_token: ByteCount(0),
                state: ByteCount(0),
                kv_window: None,
            })
            .collect(),
        joined: Vec::new(),
        passes: 1,
        embedding: ByteCount(10 * MIB),
        head: ByteCount(10 * MIB),
        shared: ByteCount(0),
        context_tokens: 8192,
        weight_bits: Some(16.0),
        draft: None,
    }
}

fn ranges(plan: &Plan) -> Vec<(u8, usize, usize)> {
    plan.stages.iter().map(|stage| (stage.node.as_bytes()[0], stage.layers.start, stage.layers.end)).collect()
}

fn shortage(refusal: Refusal) -> Box<Shortage> {
    match refusal {
        Refusal::DoesNotFit(shortage) => shortage,
        other => panic!("refused for another reason: {other}"),
    }
}

#[test]
fn one_node_is_enough_when_the_model_fits_and_it_is_the_coordinators() {
    let plan = plan(&model(&[10; 4]), &offers(&[500, 500, 900]), &Wish::default()).unwrap();
    assert_eq!(ranges(&plan), [(0, 0, 4)]);
    assert_eq!(plan.weights(), ByteCount(60 * MIB));
    assert_eq!(plan.budgets.len(), 3);
    assert_eq!(plan.budgets[0].planned, ByteCount(60 * MIB) + WORKER_RESERVE);
}

#[test]
fn a_faster_node_is_preferred_to_the_coordinators() {
    let mut offers = offers(&[500, 500]);
    offers[0].bytes_per_second = Some(100e9);
    offers[1].bytes_per_second = Some(200e9);
    let plan = plan(&model(&[10; 4]), &offers, &Wish::default()).unwrap();
    assert_eq!(ranges(&plan), [(1, 0, 4)]);
    // 40 MiB of layers and 10 MiB of head at 200 GB/s.
    let expected = 200e9 / (50.0 * MIB as f64);
    assert!((plan.tokens_per_second.unwrap() / expected - 1.0).abs() < 1e-6);
}

#[test]
fn stages_take_time_in_proportion_to_the_speed_of_their_nodes() {
    let mut offers = offers(&[2000, 2000]);
    offers[0].bytes_per_second = Some(100e9);
    offers[1].bytes_per_second = Some(300e9);
    let wish = Wish { stages: Some(2), ..Wish::default() };
    let plan = plan(&ModelCost { head: ByteCount(0), ..model(&[10; 8]) }, &offers, &wish).unwrap();
    let layers_of =
        |number| plan.stages.iter().find(|stage| stage.node == node(number)).unwrap().layers.len();
    assert_eq!((layers_of(0), layers_of(1)), (2, 6));
}

#[test]
fn a_slow_link_is_crossed_as_seldom_as_possible() {
    // 0 and 2 are near each other, 1 is near 2, 0 to 1 is far: 2 belongs in the middle.
    let mut offers = offers(&[500, 500, 500]);
    offers[0].round_trips =
        [(node(1), Duration::from_millis(8)), (node(2), Duration::from_micros(300))].into();
    offers[1].round_trips = [(node(2), Duration::from_micros(300))].into();
    for offer in &mut offers {
        offer.bytes_per_second = Some(100e9);
    }
    let wish = Wish { stages: Some(3), ..Wish::default() };
    let plan = plan(&model(&[10; 9]), &offers, &wish).unwrap();
    assert_eq!(plan.stages[1].node, node(2));
}

#[test]
fn a_tied_embedding_counts_once_on_one_node_and_twice_on_two() {
    let tied = ModelCost { shared: ByteCount(10 * MIB), ..model(&[10; 4]) };
    let whole = plan(&tied, &offers(&[500, 500]), &Wish::default()).unwrap();
    assert_eq!(whole.weights(), ByteCount(50 * MIB));
    let two = Wish { stages: Some(2), ..Wish::default() };
    assert_eq!(plan(&tied, &offers(&[500, 500]), &two).unwrap().weights(), ByteCount(60 * MIB));
}

#[test]
fn kv_memory_is_reserved_for_every_sequence() {
    let mut model = model(&[10; 4]);
    for layer in &mut model.layers {
        layer.kv_per_token = ByteCount(1024);
    }
    let wish = Wish { context_tokens: Some(2048), concurrent_sequences: Some(3), ..Wish::default() };
    let plan = plan(&model, &offers(&[500]), &wish).unwrap();
    assert_eq!(plan.kv(), ByteCount(4 * 2048 * 3 * 1024));
}

#[test]
fn a_profile_becomes_a_cost() {
    let profile = ModelProfile {
        architecture: "qwen2".into(),
        layer_bytes: vec![ByteCount(50), ByteCount(60)],
        kv_bytes: vec![ByteCount(4), ByteCount(4)],
        kv_windows: vec![None, Some(32)],
        state_bytes: vec![ByteCount(0), ByteCount(7)],
        joined: vec![],
        passes: 1,
        embedding_bytes: ByteCount(45),
        entrance_bytes: ByteCount(3),
        head_bytes: ByteCount(47),
        tied_embeddings: true,
        hidden: 8,
        vocabulary: 10,
        context: None,
        dtype: Dtype::BF16,
    };
    let cost = ModelCost::from(&profile);
    assert_eq!(cost.weight_bits, Some(4.5));
    assert_eq!(cost.layers[1].kv(100, 2), ByteCount(4 * 32 * 2 + 2 * 7));
    let whole = plan(&cost, &offers(&[500]), &Wish::default()).unwrap();
    assert_eq!(whole.weights(), profile.total_bytes());
    assert_eq!(whole.context_tokens, 4096);
}

#[test]
fn layers_that_share_caches_stay_together() {
    // Layers 3 to 5 see the caches of 2 and 3: cuts are allowed before 1 and 2 only.
    let joined = ModelCost { joined: vec![3, 4, 5], ..model(&[100; 6]) };
    let stages = |count| Wish { stages: Some(count), ..Wish::default() };
    let two = plan(&joined, &offers(&[900, 900]), &stages(2)).unwrap();
    assert_eq!(ranges(&two), [(0, 0, 2), (1, 2, 6)]);
    let three = plan(&joined, &offers(&[900, 900, 900]), &stages(3)).unwrap();
    assert_eq!(ranges(&three), [(0, 0, 1), (1, 1, 2), (2, 2, 6)]);
    let refusal = plan(&joined, &offers(&[900, 900, 900, 900]), &stages(4)).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "4 stages are not possible: a model of 6 layers, 3 of which see the caches of earlier ones and stay with them, can have 1 to 3"
    );
    // Enough memory in sum, but the four layers and the head do not fit anywhere.
    let shortage = shortage(plan(&joined, &offers(&[400, 400, 400]), &Wish::default()).unwrap_err());
    assert_eq!(shortage.largest_piece, ByteCount(410 * MIB) + WORKER_RESERVE);
}

#[test]
fn several_stages_on_one_node_only_when_it_is_named_several_times() {
    let two_stages = |nodes: &[&str]| Wish {
        stages: Some(2),
        nodes: nodes.iter().map(|name| (*name).to_owned()).collect(),
        ..Wish::default()
    };
    let one = offers(&[600]);
    let refusal = plan(&model(&[10; 4]), &one, &two_stages(&[])).unwrap_err();
    assert_eq!(refusal, Refusal::NotEnoughNodes { asked: 2, nodes: 1 });
    let twice = plan(&model(&[10; 4]), &one, &two_stages(&["mac-0", "mac-0"])).unwrap();
    assert_eq!(ranges(&twice), [(0, 0, 2), (0, 2, 4)]);
    // Two nodes can do it: naming one of them twice changes nothing.
    let both =
        plan(&model(&[10; 4]), &offers(&[600, 600]), &two_stages(&["mac-0", "mac-0", "mac-1"])).unwrap();
    assert_ne!(both.stages[0].node, both.stages[1].node);
}

#[test]
fn nodes_are_found_by_name_and_by_the_beginning_of_their_id() {
    let wish = |name: &str| Wish { nodes: vec![name.into()], ..Wish::default() };
    let offers = offers(&[500, 500]);
    let model = model(&[10; 4]);
    assert_eq!(ranges(&plan(&model, &offers, &wish("mac-1")).unwrap()), [(1, 0, 4)]);
    assert_eq!(ranges(&plan(&model, &offers, &wish("0101")).unwrap()), [(1, 0, 4)]);
    let unknown = plan(&model, &offers, &wish("mac-9")).unwrap_err();
    assert_eq!(unknown.to_string(), "no node is called \"mac-9\"; the nodes are: mac-0, mac-1");
    assert!(matches!(plan(&model, &offers, &wish("010")).unwrap_err(), Refusal::UnknownNode { .. }));
    let twins = vec![
        Offer { name: "twin".into(), ..offers[0].clone() },
        Offer { name: "twin".into(), ..offers[1].clone() },
    ];
    assert!(matches!(plan(&model, &twins, &wish("twin")).unwrap_err(), Refusal::AmbiguousNode { .. }));
}

#[test]
fn impossible_wishes_are_refused_with_the_bounds() {
    let cases = [
        (
            Wish { stages: Some(5), ..Wish::default() },
            "5 stages are not possible: a model of 4 layers can have 1 to 4",
        ),
        (
            Wish { stages: Some(0), ..Wish::default() },
            "0 stages are not possible: a model of 4 layers can have 1 to 4",
        ),
        (
            Wish { context_tokens: Some(9000), ..Wish::default() },
            "a context of 9000 tokens is not possible: this model allows 1 to 8192",
        ),
        (
            Wish { concurrent_sequences: Some(0), ..Wish::default() },
            "0 concurrent sequences are not possible: 1 to 1024 are",
        ),
    ];
    for (wish, text) in cases {
        assert_eq!(plan(&model(&[10; 4]), &offers(&[500]), &wish).unwrap_err().to_string(), text);
    }
    assert_eq!(plan(&model(&[10]), &[], &Wish::default()).unwrap_err(), Refusal::NoNodes);
    assert_eq!(plan(&model(&[]), &offers(&[500]), &Wish::default()).unwrap_err(), Refusal::NoLayers);
}

#[test]
fn a_plan_explains_itself_with_numbers() {
    let mut model = model(&[100; 8]);
    for layer in &mut model.layers {
        layer.kv_per_token = ByteCount(4096);
    }
    let planned = plan(&model, &offers(&[740, 900, 100]), &Wish::default()).unwrap();
    assert_eq!(
        planned.explain(),
        "llama with 8 layers: 860 MB of weights and 537 MB of KV cache (4096 tokens of context for 4 sequences), 1.4 GB together.
mac-0 runs layers 0..4 (4 of 8): 430 MB of weights, 268 MB of KV cache and 67.1 MB of working space, 765 MB in all.
mac-1 runs layers 4..8 (4 of 8): 430 MB of weights, 268 MB of KV cache and 67.1 MB of working space, 765 MB in all.
mac-0 may use 881 MB, of which 105 MB is taken; this adds 765 MB and leaves 10.5 MB.
mac-1 may use 1.0 GB, of which 105 MB is taken; this adds 765 MB and leaves 178 MB.
mac-2 is not needed (105 MB free).
No speed is predicted: the memory bandwidth of a node is not known."
    );
}

#[test]
fn many_nodes_and_many_layers_are_placed_quickly() {
    let started = std::time::Instant::now();
    let wish = Wish { stages: Some(8), ..Wish::default() };
    let mut offers = offers(&[3000, 3100, 3200, 3300, 3400, 3500, 3600, 3700, 10, 20]);
    for (index, offer) in offers.iter_mut().enumerate() {
        offer.bytes_per_second = Some(100e9 + index as f64 * 20e9);
    }
    let plan = plan(&model(&[100; 126]), &offers, &wish).unwrap();
    assert_eq!(plan.stages.len(), 8);
    assert!(started.elapsed() < Duration::from_secs(10), "took {:?}", started.elapsed());
}

// --- promises on random cases ---

#[derive(Clone, Debug)]
struct Case {
    model: ModelCost,
    offers: Vec<Offer>,
    wish: Wish,
}

fn cases() -> impl Strategy<Value = Case> {
    let window = proptest::option::weighted(0.2, 1usize..8192);
    let layer =
        (1u64..40, 0u64..2000, 0u64..4_000_000, window).prop_map(|(mib, kv, state, kv_window)| LayerCost {
            weights: ByteCount(mib * MIB),
            kv_per_token: ByteCount(kv),
            state: ByteCount(state),
            kv_window,
        });
    let offer = (40u64..260, proptest::option::weighted(0.7, 50u64..800));
    (
        proptest::collection::vec((layer, proptest::bool::weighted(0.2)), 1..7),
        proptest::collection::vec(offer, 1..5),
        (0u64..20, 0u64..20, any::<bool>()),
        proptest::option::weighted(0.3, 1usize..5),
        (1usize..8192, 1usize..5),
    )
        .prop_map(|(layers, offers, (embedding, head, tied), stages, (context, sequences))| Case {
            model: ModelCost {
                architecture: "llama".into(),
                passes: 1,
                joined: (1..layers.len()).filter(|layer| layers[*layer].1).collect(),
                layers: layers.into_iter().map(|(layer, _)| layer).collect(),
                embedding: ByteCount(embedding * MIB),
                head: ByteCount(if tied { embedding } else { head } * MIB),
                shared: ByteCount(if tied { embedding * MIB } else { 0 }),
                context_tokens: 8192,
                weight_bits: Some(16.0),
                draft: None,
            },
            offers: offers
                .into_iter()
                .enumerate()
                .map(|(number, (free, speed))| Offer {
                    bytes_per_second: speed.map(|speed| speed as f64 * 1e9),
                    ..offer_of(number, free)
                })
                .collect(),
            wish: Wish {
                stages,
                context_tokens: Some(context),
                concurrent_sequences: Some(sequences),
                ..Wish::default()
            },
        })
}

fn offer_of(number: usize, free: u64) -> Offer {
    offer(number as u8, free)
}

/// Written from the definition, apart from the implementation: bytes of a stage.
fn stage_bytes(case: &Case, layers: LayerRange) -> u64 {
    let context = case.wish.context_tokens.unwrap();
    let sequences = case.wish.concurrent_sequences.unwrap() as u64;
    let mut bytes = WORKER_RESERVE.0;
    for layer in &case.model.layers[layers.start..layers.end] {
        bytes += layer.weights.0
            + layer.kv_per_token.0 * sequences * context.min(layer.kv_window.unwrap_or(context)) as u64
            + layer.state.0 * sequences;
    }
    let is_last = layers.end == case.model.layers.len();
    match (layers.start == 0, is_last) {
        (true, true) => bytes + case.model.embedding.0 + case.model.head.0 - case.model.shared.0,
        (true, false) => bytes + case.model.embedding.0,
        (false, true) => bytes + case.model.head.0,
        (false, false) => bytes,
    }
}

fn stage_seconds(case: &Case, node: usize, layers: LayerRange) -> f64 {
    let slowest = case.offers.iter().filter_map(|offer| offer.bytes_per_second).fold(f64::MAX, f64::min);
    let unknown = if slowest == f64::MAX { 100e9 } else { slowest };
    let mut bytes: u64 =
        case.model.layers[layers.start..layers.end].iter().map(|layer| layer.weights.0).sum();
    if layers.end == case.model.layers.len() {
        bytes += case.model.head.0;
    }
    bytes as f64 / case.offers[node].bytes_per_second.unwrap_or(unknown)
}

/// Every order of nodes and every cut: (stages, seconds of the slowest stage) of the best.
fn brute_force(case: &Case) -> Option<(usize, f64)> {
    fn visit(case: &Case, start: usize, used: &mut Vec<usize>, slowest: f64, found: &mut Vec<(usize, f64)>) {
        let layers = case.model.layers.len();
        if start == layers {
            found.push((used.len(), slowest));
            return;
        }
        for node in (0..case.offers.len()).filter(|node| !used.contains(node)).collect::<Vec<_>>() {
            for end in (start + 1..=layers).filter(|end| !case.model.joined.contains(end)) {
                let range = LayerRange::new(start, end);
                if stage_bytes(case, range) > case.offers[node].free().0 {
                    break;
                }
                used.push(node);
                visit(case, end, used, slowest.max(stage_seconds(case, node, range)), found);
                used.pop();
            }
        }
    }
    let mut found = Vec::new();
    visit(case, 0, &mut Vec::new(), 0.0, &mut found);
    let stages = match case.wish.stages {
        Some(stages) => stages,
        None => found.iter().map(|(stages, _)| *stages).min()?,
    };
    found.retain(|(count, _)| *count == stages);
    found.into_iter().min_by(|left, right| left.1.total_cmp(&right.1))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn placement_is_as_good_as_trying_everything(case in cases()) {
        let asked_too_much = case.wish.stages.is_some_and(|stages| {
            stages > case.model.layers.len() - case.model.joined.len() || stages > case.offers.len()
        });
        let planned = plan(&case.model, &case.offers, &case.wish);
        if asked_too_much {
            let is_refused =
                matches!(planned, Err(Refusal::Stages { .. } | Refusal::NotEnoughNodes { .. }));
            prop_assert!(is_refused);
            return Ok(());
        }
        match (planned, brute_force(&case)) {
            (Ok(plan), Some((stages, seconds))) => {
                prop_assert_eq!(plan.stages.len(), stages);
                let mut covered = 0;
                let mut slowest: f64 = 0.0;
                for stage in &plan.stages {
                    prop_assert_eq!(stage.layers.start, covered);
                    prop_assert!(!stage.layers.is_empty());
                    covered = stage.layers.end;
                    prop_assert_eq!(stage.memory().0, stage_bytes(&case, stage.layers));
                    let node = stage.node.as_bytes()[0] as usize;
                    prop_assert!(stage.memory() <= case.offers[node].free());
                    slowest = slowest.max(stage_seconds(&case, node, stage.layers));
                }
                prop_assert_eq!(covered, case.model.layers.len());
                prop_assert!(slowest <= seconds * (1.0 + 1e-9) + 2e-12, "{} against {}", slowest, seconds);
                prop_assert!(!plan.explain().is_empty());
            }
            (Err(Refusal::DoesNotFit(shortage)), None) => advice_is_true(&case, &shortage)?,
            (planned, best) => prop_assert!(false, "{planned:?} but by trying everything {best:?}"),
        }
    }

    #[test]
    fn no_budget_is_exceeded_when_stages_share_nodes(
        free in proptest::collection::vec(100u64..500, 1..3),
        times in 1usize..4,
        layers in proptest::collection::vec(1u64..60, 4..8),
    ) {
        let offers = offers(&free);
        let nodes: Vec<String> =
            offers.iter().flat_map(|offer| vec![offer.name.clone(); times]).collect();
        let stages = nodes.len().min(4);
        let wish = Wish { stages: Some(stages), nodes, ..Wish::default() };
        match plan(&model(&layers), &offers, &wish) {
            Ok(plan) => {
                prop_assert_eq!(plan.stages.len(), stages);
                for budget in &plan.budgets {
                    prop_assert!(budget.used + budget.planned <= budget.budget);
                }
            }
            Err(refusal) => prop_assert!(matches!(refusal, Refusal::DoesNotFit(_)), "{}", refusal),
        }
    }
}

/// Whoever follows the advice gets a plan.
fn advice_is_true(case: &Case, shortage: &Shortage) -> Result<(), TestCaseError> {
    let advice = &shortage.advice;
    let wish = &case.wish;
    let succeeds = |model: &ModelCost, offers: &[Offer], wish: Wish| {
        prop_assert!(plan(model, offers, &wish).is_ok(), "bad advice: {:?}", advice);
        Ok(())
    };
    if let Some(tokens) = advice.context_tokens {
        succeeds(&case.model, &case.offers, Wish { context_tokens: Some(tokens), ..wish.clone() })?;
    }
    if let Some(sequences) = advice.sequences {
        succeeds(&case.model, &case.offers, Wish { concurrent_sequences: Some(sequences), ..wish.clone() })?;
    }
    if let Some(stages) = advice.stages {
        succeeds(&case.model, &case.offers, Wish { stages: Some(stages), ..wish.clone() })?;
    }
    if let Some(bytes) = advice.further_node {
        let mut offers = case.offers.clone();
        offers.push(Offer { budget: bytes, used: ByteCount(0), ..offer_of(offers.len(), 0) });
        succeeds(&case.model, &offers, wish.clone())?;
    }
    let text = shortage.to_string();
    prop_assert!(text.starts_with("the model does not fit"), "{}", text);
    prop_assert!(text.contains("free"), "{}", text);
    Ok(())
}

#[test]
fn a_shortage_says_what_is_missing_and_what_would_fit() {
    let mut model = model(&[1000; 8]);
    for layer in &mut model.layers {
        layer.kv_per_token = ByteCount(16 << 10);
    }
    let shortage = shortage(plan(&model, &offers(&[5000, 4600]), &Wish::default()).unwrap_err());
    assert_eq!(shortage.advice.weight_bits, Some(8));
    assert_eq!(shortage.advice.sequences, Some(2));
    assert_eq!(
        shortage.to_string(),
        "the model does not fit: it needs 8.4 GB for weights, 2.1 GB for the KV cache (4096 tokens of context for 4 sequences) \
         and 67.1 MB for each worker; mac-0 has 5.2 GB free, mac-1 has 4.8 GB free; at least 558 MB is missing; what would fit: \
         a context of 2048 tokens, or 2 sequences at a time, or the model quantized to 8 bits, or a further node with 2.8 GB free"
    );
}
