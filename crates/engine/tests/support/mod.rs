//! Asks mlx-lm what it computes, and runs the engine on the same models.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{
    LayerRange, Sampled, Sampling, SequenceId, SequenceSpec, Stage, Step, StepInput, StepOutput,
};
use mlxnode_engine::{EngineStage, StageOptions};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// What mlx-lm made of one run.
#[derive(Deserialize)]
pub struct Expected {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
}

#[derive(Deserialize)]
pub struct ExpectedModel {
    pub runs: Vec<Expected>,
}

#[derive(Deserialize)]
struct Expectations {
    models: Vec<ExpectedModel>,
}

/// Runs the oracle on models as `oracle.py` describes them. Panics with what to do when there is no oracle.
pub fn ask_oracle(folder: &Path, models: &[Value]) -> Vec<ExpectedModel> {
    let expectations: Expectations = ask("oracle.py", folder, &json!({ "models": models }));
    expectations.models
}

/// Runs one of the oracle's scripts on a request. Panics with what to do when there is no oracle.
pub fn ask<T: serde::de::DeserializeOwned>(script: &str, folder: &Path, request: &Value) -> T {
    let python = std::env::var_os("MLXNODE_ORACLE_PYTHON").expect(
        "this test compares with mlx-lm: set MLXNODE_ORACLE_PYTHON to a Python that has mlx-lm 0.32.2, \
         or run it by `cargo xtask test`, which makes one",
    );
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/oracle").join(script);
    let file = folder.join("request.json");
    std::fs::write(&file, request.to_string()).unwrap();
    let output = Command::new(python)
        .arg(script)
        .arg(file)
        .env("MLX_DISABLE_COMPILE", "1")
        .env("HF_HUB_OFFLINE", "1")
        .env("TMPDIR", folder)
        .output()
        .expect("MLXNODE_ORACLE_PYTHON does not start");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the oracle failed: {errors}");
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("the oracle did not answer in JSON: {error}; it said {errors}"))
}

/// Token ids that look random and are the same everywhere.
pub fn prompt(length: usize, vocabulary: u64, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary) as u32
    };
    (0..length).map(|_| next()).collect()
}

/// A chain of stages in this process.
pub struct Pipeline {
    pub stages: Vec<EngineStage>,
    next: u64,
}

impl Pipeline {
    /// The layers of the model in `folder`, split into `count` stages as evenly as it goes.
    pub fn load(folder: &Path, count: usize) -> Self {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let layers = checkpoint.spec().layer_count();
        let bounds: Vec<usize> = (0..=count).map(|stage| stage * layers / count).collect();
        let stages = bounds.windows(2).map(|pair| {
            let range = LayerRange::new(pair[0], pair[1]);
            EngineStage::load(&checkpoint, range, StageOptions::default(), &mut |_, _| {}).unwrap()
        });
        Self { stages: stages.collect(), next: 0 }
    }

    pub fn open(&mut self, spec: &SequenceSpec) -> SequenceId {
        let id = SequenceId(self.next);
        self.next += 1;
        for stage in &mut self.stages {
            stage.open(id, spec.clone()).unwrap();
        }
        id
    }

    pub fn close(&mut self, id: SequenceId) {
        self.stages.iter_mut().for_each(|stage| stage.close(id));
    }

    /// One step through all stages.
    pub fn step(&mut self, id: SequenceId, position: usize, tokens: &[u32], sample: bool) -> StepOutput {
        let mut input = StepInput::Tokens;
        let mut output = StepOutput::Nothing;
        for stage in &mut self.stages {
            let step = Step { sequence: id, position, tokens: tokens.to_vec(), input: input.clone(), sample };
            output = stage.step(step).unwrap();
            if let StepOutput::Activation(activation) = &output {
                input = StepInput::Activation(activation.clone());
            }
        }
        output
    }

    /// The logits of all positions of `tokens`, from one step.
    pub fn logits(&mut self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let id = self.open(&spec(tokens.len(), 1, Sampling::default()));
        let (last, before) = self.stages.split_last_mut().unwrap();
        let mut input = StepInput::Tokens;
        for stage in before {
            let step = Step { sequence: id, position: 0, tokens: tokens.to_vec(), input, sample: false };
            let StepOutput::Activation(activation) = stage.step(step).unwrap() else { panic!("not last") };
            input = StepInput::Activation(activation);
        }
        let step = Step { sequence: id, position: 0, tokens: tokens.to_vec(), input, sample: false };
        let logits = last.logits(step).unwrap();
        self.close(id);
        logits
    }

    /// Generates `count` tokens. The prompt goes through in chunks of `chunk`, its last token by itself as in mlx-lm.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        count: usize,
        sampling: Sampling,
        chunk: usize,
    ) -> Vec<Sampled> {
        let id = self.open(&spec(prompt.len(), count, sampling));
        let (last, before) = prompt.split_last().unwrap();
        let mut position = 0;
        for tokens in before.chunks(chunk) {
            self.step(id, position, tokens, false);
            position += tokens.len();
        }
        let mut token = *last;
        let mut generated = Vec::new();
        while generated.len() < count {
            let StepOutput::Sampled(sampled) = self.step(id, position, &[token], true) else {
                panic!("no sample")
            };
            position += 1;
            token = sampled.token;
            generated.push(sampled);
        }
        self.close(id);
        generated
    }
}

pub fn spec(prompt_tokens: usize, max_tokens: usize, sampling: Sampling) -> SequenceSpec {
    SequenceSpec::new(prompt_tokens, max_tokens, sampling)
}

pub fn tokens(sampled: &[Sampled]) -> Vec<u32> {
    sampled.iter().map(|sampled| sampled.token).collect()
}

/// Largest difference, relative to the largest expected value.
pub fn relative_difference(actual: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(actual.len(), expected.len(), "positions");
    let mut largest = f32::MIN_POSITIVE;
    let mut difference = 0.0_f32;
    for (actual, expected) in actual.iter().zip(expected) {
        assert_eq!(actual.len(), expected.len(), "vocabulary");
        for (actual, expected) in actual.iter().zip(expected) {
            largest = largest.max(expected.abs());
            let distance = (actual - expected).abs();
            difference = if distance.is_nan() { f32::INFINITY } else { difference.max(distance) };
        }
    }
    difference / largest
}

/// A folder for one test's files, removed at its end.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}
