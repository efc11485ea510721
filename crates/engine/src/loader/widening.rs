//! What a family has besides one hidden vector: how it begins, what layers make of it, and how it ends.

use super::{LoadError, Source, size};
use crate::alternating_updates::AlternatingUpdates;
use crate::decoder::{Flow, OverBlocks};
use crate::linear::Linear;
use crate::ngrams::{Ngrams, Table};
use crate::residual_blocks::Mixture;
use crate::widening::{Entrance, Exit, GatedInput, InputTable};
use mlxnode_checkpoint::layout::FINAL_NORM;
use mlxnode_checkpoint::{Flow as FlowSpec, GAINS, ModelSpec};
use mlxnode_mlx::{Array, Dtype};

impl Source<'_> {
    /// What makes of an embedding what travels; None when nothing else does.
    pub(super) fn entrance(&mut self, spec: &ModelSpec) -> Result<Option<Entrance>, LoadError> {
        let projections = self.projections("altup_projections", spec)?;
        let inputs = match spec.widening.layer_inputs {
            None => None,
            Some(inputs) => Some(InputTable {
                table: self.embedding("model.embed_tokens_per_layer")?,
                rows: u32::try_from(inputs.vocabulary).ok().filter(|_| inputs.vocabulary < spec.vocabulary),
                projection: self.linear("model.per_layer_model_projection")?,
                norm: self.read_norm("model.per_layer_projection_norm", spec)?,
                hidden: size(spec.hidden),
                layers: size(spec.layer_count()),
                width: size(inputs.width),
            }),
        };
        let widens = inputs.is_some() || !projections.is_empty();
        Ok(widens.then_some(Entrance { projections, inputs }))
    }

    /// Tables of groups of tokens; None when the model has none.
    pub(super) fn ngrams(&mut self, spec: &ModelSpec) -> Result<Option<Ngrams>, LoadError> {
        let Some(ngrams) = spec.ngrams else { return Ok(None) };
        let mut tables = Vec::with_capacity(ngrams.tables());
        for index in 0..ngrams.tables() {
            let vectors = self.embedding(&format!("model.ngram_embeddings.embedders.{index}"))?;
            let projection = self.linear(&format!("model.ngram_embeddings.post_projs.{index}"))?;
            let tokens = index / ngrams.splits + 2;
            let table = Table::new(vectors, projection, ngrams.rows_of(index), tokens, spec.vocabulary)?;
            self.queue(table.numbers());
            tables.push(table);
        }
        Ok(Some(Ngrams { tables, longest: size(ngrams.longest) }))
    }

    /// What makes one hidden vector of several; None when there is one.
    pub(super) fn exit(&mut self, spec: &ModelSpec) -> Result<Option<Exit>, LoadError> {
        let projections = self.projections("altup_unembed_projections", spec)?;
        Ok((!projections.is_empty()).then_some(Exit { projections }))
    }

    fn projections(&mut self, name: &str, spec: &ModelSpec) -> Result<Vec<Linear>, LoadError> {
        (1..spec.widening.streams)
            .map(|stream| self.linear(&format!("model.{name}.{}", stream - 1)))
            .collect()
    }

    /// `path` gives the full path of a name in the layer.
    pub(super) fn flow(
        &mut self,
        path: &dyn Fn(&str) -> String,
        flow: &FlowSpec,
        spec: &ModelSpec,
    ) -> Result<Flow, LoadError> {
        Ok(match *flow {
            FlowSpec::Sequential(residual) => Flow::Sequential(residual),
            FlowSpec::Parallel(order) => Flow::Parallel(order),
            FlowSpec::Whole => Flow::Whole,
            FlowSpec::ThenLastNorm => {
                let norm = self.norm_of(spec.last_norm(), FINAL_NORM, spec.norm_eps)?;
                self.queue(norm.arrays());
                Flow::ThenNorm(norm)
            }
            FlowSpec::OverBlocks { first } => Flow::OverBlocks(Box::new(OverBlocks {
                first,
                mixer: self.mixture(&path("self_attention_res"), spec)?,
                feed_forward: self.mixture(&path("mlp_res"), spec)?,
            })),
            FlowSpec::WithEmbedding => {
                let [mixer, feed_forward, embedding] = GAINS.map(path);
                Flow::WithEmbedding(Box::new([
                    self.number(&mixer)?,
                    self.number(&feed_forward)?,
                    self.number(&embedding)?,
                ]))
            }
            FlowSpec::WithInput(input) => {
                let input = input.map(|_| self.gated_input(path, spec)).transpose()?;
                let factor = self.read(&path("layer_scalar"))?;
                Flow::WithInput { input: input.map(Box::new), factor }
            }
            FlowSpec::AlternatingUpdates(updates) => {
                let scale = updates.scaled.then(|| self.read(&path("altup.correct_output_scale")));
                Flow::AlternatingUpdates(Box::new(AlternatingUpdates {
                    streams: size(updates.streams),
                    active: size(updates.active),
                    correction: self.coefficients(&path("altup.correction_coefs.weight"), updates.clip)?,
                    prediction: self.coefficients(&path("altup.prediction_coefs.weight"), updates.clip)?,
                    router: self.linear(&path("altup.modality_router"))?,
                    router_norm: self.read_norm(&path("altup.router_norm"), spec)?,
                    output_scale: scale.transpose()?,
                    left: self.linear(&path("laurel.linear_left"))?,
                    right: self.linear(&path("laurel.linear_right"))?,
                    branch_norm: self.read_norm(&path("laurel.post_laurel_norm"), spec)?,
                    input: self.gated_input(path, spec)?,
                }))
            }
        })
    }

    /// The norm's weights times the vector that weighs blocks of layers, in single precision, read.
    pub(super) fn mixture(&mut self, path: &str, spec: &ModelSpec) -> Result<Mixture, LoadError> {
        let norm = self.tensor(&format!("{path}_norm.weight"))?;
        let vector = self.tensor(&format!("{path}_proj.weight"))?;
        let vector = self.device.reshape(&vector, &[size(spec.hidden)])?;
        let weights = self.device.multiply(&self.device.cast(&norm, Dtype::F32)?, &vector)?;
        self.queue([&weights]);
        Ok(Mixture { weights, eps: spec.norm_eps })
    }

    fn gated_input(
        &mut self,
        path: &dyn Fn(&str) -> String,
        spec: &ModelSpec,
    ) -> Result<GatedInput, LoadError> {
        Ok(GatedInput {
            gate: self.linear(&path("per_layer_input_gate"))?,
            projection: self.linear(&path("per_layer_projection"))?,
            norm: self.read_norm(&path("post_per_layer_input_norm"), spec)?,
        })
    }

    /// A matrix as a factor from the right, in single precision and within `-clip..=clip`: what mlx-lm makes of it in each step.
    fn coefficients(&mut self, name: &str, clip: Option<f32>) -> Result<Array, LoadError> {
        let (device, number) = (self.device, |value: f32| Array::scalar(value, Dtype::F32));
        let mut matrix = device.cast(&self.tensor(name)?, Dtype::F32)?;
        if let Some(clip) = clip {
            matrix = device.minimum(&device.maximum(&matrix, &number(-clip)?)?, &number(clip)?)?;
        }
        self.queue([&matrix]);
        let turned = device.transpose(&matrix, &[1, 0])?;
        self.queue([&turned]);
        Ok(turned)
    }

    /// A tensor, read.
    fn read(&mut self, name: &str) -> Result<Array, LoadError> {
        let tensor = self.tensor(name)?;
        self.queue([&tensor]);
        Ok(tensor)
    }
}
