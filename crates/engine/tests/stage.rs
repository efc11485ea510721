//! The stage keeps its promises: sequences are independent, steps are checked, resuming and splitting change nothing, and a damaged
//! model ends in an error.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use bytes::Bytes;
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{
    Activation, Dtype, LayerRange, Penalty, Sampling, SequenceId, Stage, StageError, Step, StepInput,
    StepOutput,
};
use mlxnode_engine::{EngineStage, LoadError, StageOptions};
use serde_json::json;
use std::path::Path;
use support::{Pipeline, prompt, spec, tokens};

const VOCABULARY: usize = 300;
const HIDDEN: usize = 32;

/// Writes a two-layer llama with weights that look random, without the help of Python. Returns the bytes of its tensors.
fn write_model(folder: &Path, damage: Option<&str>) -> usize {
    let config = json!({"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 2, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
        "tie_word_embeddings": false});
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let spec = mlxnode_checkpoint::architectures::spec(
        &mlxnode_checkpoint::Config::from_json(config.to_string().as_bytes()).unwrap(),
    )
    .unwrap();
    let mut tensors = Vec::new();
    for module in spec.modules(LayerRange::new(0, 2)) {
        for tensor in module.tensors(None).unwrap() {
            let count: usize = tensor.shape.iter().product();
            let seed = tensor.name.bytes().map(u64::from).sum();
            let scale = if tensor.shape.len() == 1 {
                0.1
            } else {
                2.0 / (*tensor.shape.last().unwrap() as f32).sqrt()
            };
            let offset = if tensor.shape.len() == 1 { 1.0 } else { 0.0 };
            let mut values: Vec<f32> = prompt(count, 2001, seed)
                .into_iter()
                .map(|value| offset + scale * (value as f32 / 1000.0 - 1.0))
                .collect();
            if damage == Some(tensor.name.as_str()) {
                values[0] = f32::NAN;
            }
            tensors.push((tensor.name, tensor.shape, values));
        }
    }
    write_tensors(&folder.join("model.safetensors"), &tensors)
}

/// The safetensors format: length of the header, header in JSON, data.
fn write_tensors(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) -> usize {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(&data);
    std::fs::write(path, file).unwrap();
    data.len()
}

fn stage(folder: &Path, start: usize, end: usize, options: StageOptions) -> EngineStage {
    let checkpoint = Checkpoint::open(folder).unwrap();
    EngineStage::load(&checkpoint, LayerRange::new(start, end), options, &mut |_, _| {}).unwrap()
}

fn step(sequence: u64, position: usize, tokens: &[u32]) -> Step {
    Step {
        sequence: SequenceId(sequence),
        position,
        tokens: tokens.to_vec(),
        input: StepInput::Tokens,
        sample: true,
    }
}

fn sampled(output: StepOutput) -> u32 {
    match output {
        StepOutput::Sampled(sampled) => sampled.token,
        other => panic!("{other:?}"),
    }
}

fn seeded() -> Sampling {
    Sampling {
        temperature: 1.5,
        seed: 3,
        repetition: Some(Penalty { strength: 1.3, context: 8 }),
        ..Sampling::default()
    }
}

#[test]
fn the_number_of_stages_changes_nothing() {
    let folder = support::folder();
    write_model(folder.path(), None);
    let prompt = prompt(40, VOCABULARY as u64, 1);
    for sampling in [Sampling::default(), seeded()] {
        let one = Pipeline::load(folder.path(), 1).generate(&prompt, 50, sampling.clone(), 2048);
        let two = Pipeline::load(folder.path(), 2).generate(&prompt, 50, sampling, 7);
        assert_eq!(tokens(&one), tokens(&two));
    }
}

#[test]
fn interleaved_sequences_do_not_disturb_each_other() {
    let folder = support::folder();
    write_model(folder.path(), None);
    let mut pipeline = Pipeline::load(folder.path(), 1);
    let prompts = [prompt(5, VOCABULARY as u64, 1), prompt(9, VOCABULARY as u64, 2)];
    let alone: Vec<_> =
        prompts.iter().map(|prompt| tokens(&pipeline.generate(prompt, 20, seeded(), 4))).collect();
    let ids: Vec<_> = prompts.iter().map(|prompt| pipeline.open(&spec(prompt.len(), 20, seeded()))).collect();
    let mut together = [vec![], vec![]];
    let mut inputs = prompts.clone();
    let mut positions = [0, 0];
    for _ in 0..20 {
        for (number, id) in ids.iter().enumerate() {
            let token = sampled(pipeline.step(*id, positions[number], &inputs[number], true));
            positions[number] += inputs[number].len();
            together[number].push(token);
            inputs[number] = vec![token];
        }
    }
    assert_eq!(together.to_vec(), alone);
}

#[test]
fn a_resumed_sequence_goes_on_as_if_nothing_had_happened() {
    let folder = support::folder();
    write_model(folder.path(), None);
    let prompt = prompt(12, VOCABULARY as u64, 4);
    let whole = tokens(&Pipeline::load(folder.path(), 1).generate(&prompt, 30, seeded(), 64));
    // Another node gets the prompt and the ten tokens that were emitted.
    let mut pipeline = Pipeline::load(folder.path(), 2);
    let id = pipeline.open(&spec(prompt.len(), 30, seeded()));
    let known = [&prompt[..], &whole[..10]].concat();
    let (last, before) = known.split_last().unwrap();
    pipeline.step(id, 0, before, false);
    let mut resumed = whole[..10].to_vec();
    let mut token = *last;
    while resumed.len() < 30 {
        token = sampled(pipeline.step(id, prompt.len() + resumed.len() - 1, &[token], true));
        resumed.push(token);
    }
    assert_eq!(resumed, whole);
}

#[test]
fn a_step_other_than_the_expected_one_is_computed_anew() {
    // A whole model works one token ahead; here the token that comes is not the one that was sampled.
    let folder = support::folder();
    write_model(folder.path(), None);
    let start = prompt(6, VOCABULARY as u64, 9);
    let mut pipeline = Pipeline::load(folder.path(), 1);
    let id = pipeline.open(&spec(start.len(), 10, Sampling::default()));
    let first = sampled(pipeline.step(id, 0, &start, true));
    let other = (first + 1) % VOCABULARY as u32;
    let second = sampled(pipeline.step(id, 6, &[other], true));
    let mut reference = Pipeline::load(folder.path(), 2);
    let id = reference.open(&spec(start.len(), 10, Sampling::default()));
    reference.step(id, 0, &start, false);
    assert_eq!(second, sampled(reference.step(id, 6, &[other], true)));
}

#[test]
fn a_stop_token_leaves_the_sequence_where_it_ended() {
    let folder = support::folder();
    write_model(folder.path(), None);
    let start = prompt(6, VOCABULARY as u64, 9);
    let expected = tokens(&Pipeline::load(folder.path(), 2).generate(&start, 3, Sampling::default(), 64));
    let mut pipeline = Pipeline::load(folder.path(), 1);
    let mut stopping = spec(start.len(), 10, Sampling::default());
    stopping.stop_tokens = vec![expected[0]];
    let id = pipeline.open(&stopping);
    assert_eq!(sampled(pipeline.step(id, 0, &start, true)), expected[0]);
    // A caller that goes on anyway gets the right tokens.
    assert_eq!(sampled(pipeline.step(id, 6, &expected[..1], true)), expected[1]);
    assert_eq!(sampled(pipeline.step(id, 7, &expected[1..2], true)), expected[2]);
}

#[test]
fn chunks_and_single_tokens_give_bit_identical_logits() {
    // Holds for the BLAS in MLX's own wheel; a library that blocks differently would differ, and tokens with it.
    let folder = support::folder();
    write_model(folder.path(), None);
    let prompt = prompt(33, VOCABULARY as u64, 5);
    let mut pipeline = Pipeline::load(folder.path(), 1);
    let at_once = pipeline.logits(&prompt);
    for chunk in [1, 2, 16] {
        let id = pipeline.open(&spec(prompt.len(), 1, Sampling::default()));
        let mut pieces = Vec::new();
        for (number, tokens) in prompt.chunks(chunk).enumerate() {
            pieces.extend(pipeline.stages[0].logits(step(id.0, number * chunk, tokens)).unwrap());
        }
        pipeline.close(id);
        assert_eq!(pieces, at_once, "chunks of {chunk}");
    }
    // The control: another prompt must differ, or the comparison proves nothing.
    let mut other = prompt.clone();
    other[0] = (other[0] + 1) % VOCABULARY as u32;
    assert_ne!(pipeline.logits(&other)[32], at_once[32]);
}

#[test]
fn steps_that_do_not_fit_are_refused_and_do_no_harm() {
    let folder = support::folder();
    write_model(folder.path(), None);
    let options = StageOptions { context_tokens: 8, max_sequences: 1, ..StageOptions::default() };
    let mut first = stage(folder.path(), 0, 1, options);
    let mut last = stage(folder.path(), 1, 2, options);
    let bad = Sampling { temperature: f32::NAN, ..Sampling::default() };
    assert!(matches!(last.open(SequenceId(1), spec(3, 5, bad)), Err(StageError::Sampling(_))));
    for stage in [&mut first, &mut last] {
        stage.open(SequenceId(1), spec(3, 5, Sampling::default())).unwrap();
        let again = stage.open(SequenceId(1), spec(3, 5, Sampling::default()));
        assert!(matches!(again, Err(StageError::AlreadyOpen(_))));
        let full = stage.open(SequenceId(2), spec(3, 5, Sampling::default())).unwrap_err();
        assert!(full.to_string().contains("close one first"), "{full}");
        assert!(matches!(stage.step(step(7, 0, &[1])), Err(StageError::UnknownSequence(_))));
    }
    assert!(matches!(first.step(step(1, 2, &[1])), Err(StageError::Position { expected: 0, actual: 2 })));
    assert!(matches!(first.step(step(1, 0, &[])), Err(StageError::Input(_))));
    assert!(matches!(first.step(step(1, 0, &[300])), Err(StageError::Token { token: 300, vocabulary: 300 })));
    assert!(matches!(first.step(step(1, 0, &[1; 9])), Err(StageError::Full { tokens: 9, limit: 8 })));
    assert!(matches!(last.step(step(1, 0, &[1])), Err(StageError::Input(_))), "token ids for a later stage");
    let activation = |tokens: usize, hidden: usize, dtype: Dtype| {
        let bytes = Bytes::from(vec![0; tokens * hidden * dtype.size()]);
        let input = StepInput::Activation(Activation::new(tokens, hidden, dtype, bytes).unwrap());
        Step { input, ..step(1, 0, &[1, 2]) }
    };
    for wrong in
        [activation(1, HIDDEN, Dtype::F32), activation(2, 31, Dtype::F32), activation(2, HIDDEN, Dtype::BF16)]
    {
        assert!(matches!(last.step(wrong), Err(StageError::Input(_))));
    }
    assert!(matches!(first.step(activation(2, HIDDEN, Dtype::F32)), Err(StageError::Input(_))));
    // After all this the sequence still works.
    let StepOutput::Activation(activation) = first.step(step(1, 0, &[1, 2])).unwrap() else {
        panic!("not last")
    };
    assert_eq!((activation.tokens(), activation.hidden(), activation.dtype()), (2, HIDDEN, Dtype::F32));
    let token =
        sampled(last.step(Step { input: StepInput::Activation(activation), ..step(1, 0, &[1, 2]) }).unwrap());
    assert!((token as usize) < VOCABULARY);
    first.close(SequenceId(1));
    first.close(SequenceId(1));
    assert!(matches!(first.step(step(1, 2, &[1])), Err(StageError::UnknownSequence(_))));
}

#[test]
fn logits_that_are_not_numbers_are_an_error() {
    let folder = support::folder();
    write_model(folder.path(), Some("model.layers.1.mlp.down_proj.weight"));
    let mut stage = stage(folder.path(), 0, 2, StageOptions::default());
    stage.open(SequenceId(1), spec(1, 5, Sampling::default())).unwrap();
    let error = stage.step(step(1, 0, &[1])).unwrap_err();
    assert!(matches!(error, StageError::NotANumber), "{error}");
    assert!(error.to_string().contains("damaged"));
}

#[test]
fn a_file_that_shrinks_after_the_check_is_an_error() {
    let folder = support::folder();
    write_model(folder.path(), None);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(folder.path().join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
    let range = LayerRange::new(0, 2);
    let result = EngineStage::load(&checkpoint, range, StageOptions::default(), &mut |_, _| {});
    let error = result.err().expect("the file is too short");
    assert!(matches!(error, LoadError::Checkpoint(_)), "{error:?}");
    assert!(error.to_string().contains("model.safetensors"), "{error}");
}

#[test]
fn a_file_that_is_replaced_after_the_check_is_an_error() {
    let folder = support::folder();
    write_model(folder.path(), None);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    // The same length, but another tensor in its place.
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let (from, to) = (b"layers.0.input_layernorm", b"layers.9.input_layernorm");
    let place = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes[place..place + to.len()].copy_from_slice(to);
    std::fs::write(&path, bytes).unwrap();
    let range = LayerRange::new(0, 2);
    let error = EngineStage::load(&checkpoint, range, StageOptions::default(), &mut |_, _| {}).err().unwrap();
    assert!(matches!(error, LoadError::Changed { .. }), "{error:?}");
}

#[test]
fn a_stage_reads_its_own_layers_only_and_reports_progress() {
    let folder = support::folder();
    let all = write_model(folder.path(), None);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mut reports = Vec::new();
    let first =
        EngineStage::load(&checkpoint, LayerRange::new(0, 1), StageOptions::default(), &mut |done, total| {
            reports.push((done, total));
        })
        .unwrap();
    let last = stage(folder.path(), 1, 2, StageOptions::default());
    assert_eq!(first.info().weights.0 + last.info().weights.0, all as u64);
    assert_eq!(reports.first(), Some(&(0, first.info().weights.0)));
    assert_eq!(reports.last(), Some(&(first.info().weights.0, first.info().weights.0)));
    assert!(reports.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{reports:?}");
    assert!(matches!(
        EngineStage::load(&checkpoint, LayerRange::new(1, 3), StageOptions::default(), &mut |_, _| {}),
        Err(LoadError::Checkpoint(_))
    ));
}
