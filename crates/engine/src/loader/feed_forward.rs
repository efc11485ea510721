//! Feed-forward networks and experts.

use super::matrices::Matrix;
use super::{LoadError, Source, arrays, size};
use crate::adapters::{ExpertSlot, Target};
use crate::dense_and_experts::DenseAndExperts;
use crate::experts::{Experts, Matrices, MatrixStack, Networks, SharedExpert};
use crate::feed_forward::{FeedForward, Network, Up, Xielu};
use crate::router::{Choice, Router};
use mlxnode_checkpoint::{
    Activation, DenseAndExpertsSpec, ExpertForm, ExpertNetworks, ExpertsSpec, FeedForward as FeedForwardSpec,
    ModelSpec, XIELU,
};
use mlxnode_mlx::{Array, Dtype, Error};
use std::cell::OnceCell;
use std::f32::consts::SQRT_2;

impl Source<'_> {
    /// `path` gives the full path of a name in the layer.
    pub(super) fn feed_forward(
        &mut self,
        path: &dyn Fn(&str) -> String,
        spec: &FeedForwardSpec,
        model: &ModelSpec,
    ) -> Result<FeedForward, LoadError> {
        Ok(match spec {
            FeedForwardSpec::Gated { intermediate, activation, fused, names, .. } => {
                let names = [names.gate, names.up, names.down].map(path);
                FeedForward::Network(self.gated(&names, *intermediate, *activation, *fused)?)
            }
            FeedForwardSpec::GatedThenNorm { intermediate, activation, names, norm, .. } => {
                let names = [names.gate, names.up, names.down].map(path);
                let network = self.gated(&names, *intermediate, *activation, false)?;
                let norm = Some(self.read_rms_norm(&path(norm), model)?);
                FeedForward::Network(Network { norm, ..network })
            }
            FeedForwardSpec::Plain { activation, names: [up, down], .. } => FeedForward::Network(Network {
                up: Up::Plain(self.linear(&path(up))?),
                activation: *activation,
                xielu: match activation {
                    Activation::Xielu => Some(Box::new(self.xielu(path)?)),
                    _ => None,
                },
                deviations: None,
                norm: None,
                down: self.linear(&path(down))?,
            }),
            FeedForwardSpec::Experts(experts) => {
                FeedForward::Experts(Box::new(self.experts(&path(experts.block), experts, model)?))
            }
            FeedForwardSpec::DenseAndExperts(both) => {
                FeedForward::DenseAndExperts(Box::new(self.dense_and_experts(path, both, model)?))
            }
            FeedForwardSpec::Linear { .. } => FeedForward::Linear(self.linear(&path("mlp.linear"))?),
            FeedForwardSpec::Absent => FeedForward::Absent,
        })
    }

    fn xielu(&mut self, path: &dyn Fn(&str) -> String) -> Result<Xielu, LoadError> {
        let mut numbers = Vec::new();
        for name in XIELU {
            numbers.push(self.tensor(&path(name))?);
        }
        let softplus = |x: &Array| self.device.logaddexp(x, &Array::scalar(0.0, x.dtype())?);
        let [above, below, slope, most] = numbers.as_slice() else {
            return Err(Error::Mlx("an activation has four numbers".to_owned()).into());
        };
        let above = softplus(above)?;
        let below = self.device.add(slope, &softplus(below)?)?;
        self.queue([&above, &below, slope, most]);
        Ok(Xielu { above, below, slope: slope.clone(), most: most.clone() })
    }

    pub(super) fn gated(
        &mut self,
        [gate, up, down]: &[String; 3],
        intermediate: usize,
        activation: Activation,
        fused: bool,
    ) -> Result<Network, LoadError> {
        let width = size(intermediate);
        let gate_up = match fused {
            true => self.fused(gate, &[width, width])?,
            false => self.stacked(&[(gate.clone(), width), (up.clone(), width)])?,
        };
        let up = Up::Gated { gate_up, intermediate: width };
        let deviations = match activation {
            Activation::GeluTanhOfLargest { sparsity } => Some(self.deviations(sparsity)?),
            _ => None,
        };
        Ok(Network { up, activation, xielu: None, deviations, norm: None, down: self.linear(down)? })
    }

    /// How many deviations above the mean this share of normally distributed numbers stays below, by mlx-lm's arithmetic.
    fn deviations(&self, sparsity: f32) -> Result<Array, LoadError> {
        let quantile = self.device.erfinv(&Array::scalar(2.0 * sparsity - 1.0, Dtype::F32)?)?;
        let deviations = self.device.multiply(&Array::scalar(SQRT_2, Dtype::F32)?, &quantile)?;
        let deviations = self.device.cast(&deviations, self.dtype)?;
        self.queue([&deviations]);
        Ok(deviations)
    }

    fn dense_and_experts(
        &mut self,
        path: &dyn Fn(&str) -> String,
        spec: &DenseAndExpertsSpec,
        model: &ModelSpec,
    ) -> Result<DenseAndExperts, LoadError> {
        let names = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"].map(path);
        let [before_dense, after_dense, before_experts, after_experts] = DenseAndExpertsSpec::NORMS.map(path);
        let scale = self.tensor(&path("router.scale"))?;
        let root = (model.hidden as f64).powf(-0.5) as f32;
        let router_norm = self.device.multiply(&scale, &Array::scalar(root, scale.dtype())?)?;
        let expert_scale = self.tensor(&path("router.per_expert_scale"))?;
        self.queue([&router_norm, &expert_scale]);
        Ok(DenseAndExperts {
            dense: self.gated(&names, spec.intermediate, spec.activation, false)?,
            networks: self.networks(&path("experts"), spec.networks)?,
            router: self.linear(&path("router.proj"))?,
            router_norm,
            eps: model.norm_eps,
            expert_scale,
            per_token: size(spec.per_token),
            norms: [
                self.read_norm(&before_dense, model)?,
                self.read_norm(&after_dense, model)?,
                self.read_norm(&before_experts, model)?,
                self.read_norm(&after_experts, model)?,
            ],
        })
    }

    /// The networks of experts in the block `path`.
    fn networks(&mut self, path: &str, networks: ExpertNetworks) -> Result<Networks, LoadError> {
        let mut matrices = |name: &str| self.matrices(&format!("{path}.{}.{name}", networks.name));
        let (gate, up, down) = match networks.form {
            ExpertForm::Gated | ExpertForm::GatedLatent { .. } => {
                (Some(matrices("gate_proj")?), matrices("up_proj")?, matrices("down_proj")?)
            }
            ExpertForm::Plain | ExpertForm::Latent { .. } => (None, matrices("fc1")?, matrices("fc2")?),
        };
        Ok(Networks { activation: networks.activation, gate, up, down })
    }

    pub(super) fn experts(
        &mut self,
        path: &str,
        spec: &ExpertsSpec,
        model: &ModelSpec,
    ) -> Result<Experts, LoadError> {
        let shared = match spec.shared {
            None => None,
            Some(shared) => {
                let names = ["gate_proj", "up_proj", "down_proj"];
                let names = names.map(|name| format!("{path}.{}.{name}", shared.name));
                let gate = shared.gate.map(|gate| self.linear(&format!("{path}.{gate}"))).transpose()?;
                let balance = spec.routing.balance;
                Some(SharedExpert {
                    network: match spec.networks.form {
                        ExpertForm::Gated | ExpertForm::GatedLatent { .. } => {
                            self.gated(&names, shared.intermediate, shared.activation, false)?
                        }
                        ExpertForm::Plain | ExpertForm::Latent { .. } => Network {
                            up: Up::Plain(self.linear(&names[1])?),
                            activation: shared.activation,
                            xielu: None,
                            deviations: None,
                            norm: None,
                            down: self.linear(&names[2])?,
                        },
                    },
                    gate,
                    balance: balance.map(|name| self.linear(&format!("{path}.{name}"))).transpose()?,
                })
            }
        };
        let networks = self.networks(path, spec.networks)?;
        let latent = match spec.networks.form {
            ExpertForm::Latent { .. } => Some([
                self.linear(&format!("{path}.fc1_latent_proj"))?,
                self.linear(&format!("{path}.fc2_latent_proj"))?,
            ]),
            ExpertForm::GatedLatent { .. } => Some([
                self.linear(&format!("{path}.routed_expert_down_proj"))?,
                self.linear(&format!("{path}.routed_expert_up_proj"))?,
            ]),
            ExpertForm::Gated | ExpertForm::Plain => None,
        };
        let latent_norm = match spec.networks.form {
            ExpertForm::GatedLatent { norm: true, .. } => {
                Some(self.read_rms_norm(&format!("{path}.routed_expert_norm"), model)?)
            }
            _ => None,
        };
        Ok(Experts { router: self.router(path, spec)?, latent, latent_norm, networks, shared })
    }

    fn router(&mut self, path: &str, spec: &ExpertsSpec) -> Result<Router, LoadError> {
        let correction = spec.routing.correction.map(|correction| format!("{path}.{}", correction.name));
        let correction = correction.map(|name| self.tensor(&name)).transpose()?;
        self.queue(correction.iter());
        Ok(Router {
            linear: self.linear(&format!("{path}.{}", spec.router.name))?,
            single_precision: spec.router.single_precision,
            choice: Choice { routing: spec.routing, per_token: size(spec.per_token) },
            compiled: OnceCell::new(),
            correction,
            experts: size(spec.experts),
        })
    }

    /// One linear map for each expert, read.
    pub(super) fn matrices(&mut self, path: &str) -> Result<Matrices, LoadError> {
        let biases = self.optional(&format!("{path}.bias"))?;
        self.queue(biases.iter());
        let weights = match self.matrix(path)? {
            Matrix::Dense(matrices) if !self.device.is_gpu() && matrices.dtype() != Dtype::F32 => {
                let dtype = matrices.dtype().name();
                return Err(LoadError::ExpertsOnCpu { tensor: format!("{path}.weight"), dtype });
            }
            Matrix::Dense(matrices) => {
                self.queue([&matrices]);
                let turned = self.device.transpose(&matrices, &[0, 2, 1])?;
                self.queue([&turned]);
                MatrixStack::Dense(turned)
            }
            // Only linear maps and tables are turned.
            Matrix::Quantized(matrices) | Matrix::Turned(matrices, _) => {
                self.queue(arrays(&matrices));
                MatrixStack::Quantized(matrices)
            }
        };
        let experts = match &weights {
            MatrixStack::Dense(matrices) => matrices.dim(0),
            MatrixStack::Quantized(matrices) => matrices.weight.dim(0),
        };
        let changes = ExpertSlot::new(self.active(), experts);
        let target = Target::Experts { slot: changes.clone(), path: path.to_owned() };
        self.registry.borrow_mut().push(target);
        Ok(Matrices { weights, biases, changes })
    }
}
