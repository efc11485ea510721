//! Mixtures of experts: which there are, how a router chooses among them, and how their results are mixed.

use super::Activation;
use crate::layout::{ModuleKind, Push};

/// Networks of which a router chooses a few for each token, stored as stacked matrices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertsSpec {
    /// Name of the block in the layer ("mlp").
    pub block: &'static str,
    /// How many there are.
    pub experts: usize,
    /// How many work on a token.
    pub per_token: usize,
    /// What maps a token to one number for each expert.
    pub router: RouterSpec,
    /// How the router's results become weights of the experts.
    pub routing: Routing,
    /// The experts themselves.
    pub networks: ExpertNetworks,
    /// The expert that works on every token.
    pub shared: Option<SharedExpertSpec>,
}

/// The linear map of a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterSpec {
    /// Its name in the block.
    pub name: &'static str,
    /// It has a bias.
    pub bias: bool,
    /// Its input is made single precision first.
    pub single_precision: bool,
}

impl RouterSpec {
    /// `gate`, without a bias, in the model's element type.
    pub const GATE: Self = Self { name: "gate", bias: false, single_precision: false };
}

/// The experts of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertNetworks {
    /// Name of the part of the block that holds their matrices ("switch_mlp").
    pub name: &'static str,
    /// What each computes.
    pub form: ExpertForm,
    /// Width between an expert's projections.
    pub intermediate: usize,
    /// The function on the gates, or between the projections.
    pub activation: Activation,
    /// The projections have biases, and so have those of the shared expert.
    pub bias: bool,
}

/// What an expert computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertForm {
    /// `down_proj(activation(gate_proj(x)) * up_proj(x))`.
    Gated,
    /// `fc2(activation(fc1(x)))`.
    Plain,
    /// The same on fewer numbers: all experts of a layer work between the maps `fc1_latent_proj` and `fc2_latent_proj` of the block.
    Latent {
        /// Width of what the experts see and give.
        width: usize,
        /// The maps have biases.
        bias: bool,
    },
    /// Gated networks on fewer numbers, between the maps `routed_expert_down_proj` and `routed_expert_up_proj` of the block.
    GatedLatent {
        /// Width of what the experts see and give.
        width: usize,
        /// There is a norm, `routed_expert_norm`, on the weighted sum of the experts' results.
        norm: bool,
    },
}

impl ExpertNetworks {
    /// Gated networks without biases in `switch_mlp`, as most families have them.
    pub fn gated(intermediate: usize, activation: Activation) -> Self {
        Self { name: "switch_mlp", form: ExpertForm::Gated, intermediate, activation, bias: false }
    }
}

/// A network of the experts' kind, gated or plain, that works on every token beside the chosen experts; its result is added to theirs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedExpertSpec {
    /// Its name in the block ("shared_experts").
    pub name: &'static str,
    /// Width between its projections.
    pub intermediate: usize,
    /// The function on its gate.
    pub activation: Activation,
    /// Name in the block of the linear map to one number, whose logistic function is a factor on its result.
    pub gate: Option<&'static str>,
}

/// How a router's results become weights of the chosen experts: scores, of which a few are chosen, made into weights.
///
/// In this order: `logits` to `scores`; the `correction` is added for the choice only; `groups` rules experts out; the largest are
/// chosen; their scores, uncorrected, are normalized and scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// What the router's results become first.
    pub scores: Scores,
    /// The router's results are made single precision before.
    pub single_precision: bool,
    /// They become `cap * tanh(result / cap)` after that.
    pub cap: Option<f32>,
    /// Added to the scores before the choice, and not part of the weights (DeepSeek-V3, "auxiliary-loss-free balancing").
    pub correction: Option<Correction>,
    /// Only the experts of a few groups may be chosen.
    pub groups: Option<Groups>,
    /// The chosen are the end of a partition of the scores instead of the start of one of their negatives. Which of equal scores
    /// are chosen, and the order in which results are added, depend on it.
    pub from_end: bool,
    /// What the weights of the chosen are divided by.
    pub normalization: Normalization,
    /// Factor on the weights.
    pub scale: Option<f32>,
    /// Factor on the weighted sum of the chosen experts' results, after it was made the networks' type.
    pub result_scale: Option<f32>,
    /// The element types of weights and sum.
    pub precision: WeightPrecision,
    /// Further choices after the experts, which have no network: they pass their input on. Not with shared experts.
    pub identities: usize,
    /// The weight is a factor on what goes into the one chosen expert instead of on its result.
    pub on_inputs: bool,
    /// Name in the block of a linear map with a bias to two numbers, whose softmax weighs the chosen experts' result and the shared
    /// one's (Klear). Not beside a gate of the shared expert.
    pub balance: Option<&'static str>,
}

/// What a router's results become.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scores {
    /// Softmax over all experts, accumulated in single precision.
    Softmax,
    /// Softmax over all experts in the results' own element type.
    RoundedSoftmax,
    /// Logistic function of each.
    Sigmoid,
    /// Square root of `ln(1 + e^x)` of each.
    RootOfSoftplus,
    /// They stay as they are until some are chosen; then softmax over those, accumulated in single precision.
    SoftmaxOfChosen,
    /// They stay as they are until some are chosen; then the logistic function of each, in single precision.
    SigmoidOfChosen,
    /// They stay as they are. The largest is chosen, then the largest of the others, and so on; a chosen one's weight is its part in
    /// the softmax over those that were still there and lie close below it: by no more than `reach`, in proportion to the larger of
    /// the two (SparseMixer: Liu et al. 2023, "Sparse Backpropagation for MoE Training"). Nothing else in the routing applies.
    SparseMixer {
        /// Twice the noise of the training.
        reach: f32,
    },
}

/// A number for each expert that counts for the choice only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    /// The tensor's name in the block ("gate.e_score_correction_bias").
    pub name: &'static str,
    /// It is made the scores' element type before it is added; otherwise the scores are made single precision.
    pub in_type_of_scores: bool,
}

impl Correction {
    /// Added in single precision.
    pub const fn named(name: &'static str) -> Self {
        Self { name, in_type_of_scores: false }
    }
}

/// Experts in groups of equal size: those of the groups with the lowest scores get another score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many groups; divides the number of experts.
    pub count: usize,
    /// How many of them stay.
    pub kept: usize,
    /// A group's score.
    pub score: GroupScore,
    /// What experts outside of the best groups get.
    pub outside: Outside,
}

/// The score of experts outside of the best groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// 0, as in most families in mlx-lm, although a correction may bring others below that.
    Zero,
    /// Minus infinity: they are never chosen.
    Never,
}

/// The score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The largest of its scores.
    Largest,
    /// The sum of the two largest.
    TwoLargest,
}

/// What the weights of the chosen experts are divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normalization {
    /// Nothing.
    None,
    /// Their sum.
    Sum,
    /// Their sum and this much.
    SumPlus(f32),
    /// Their sum, but at least this.
    SumAtLeast(f32),
}

/// The element types in which results are weighted and added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightPrecision {
    /// Weights as they come; the sum is made the networks' type at once.
    SumRounded,
    /// Weights are made single precision first; the sum is made the networks' type at once.
    SumInSingle,
    /// Weights as they come; a shared expert's result is added to the sum as it is.
    SumAsIs,
    /// Weights are made the type of the block's input first.
    WeightsRounded,
}

impl Routing {
    /// Softmax over the chosen: Mixtral.
    pub const CHOSEN: Self = Self { scores: Scores::SoftmaxOfChosen, ..Self::ALL };
    /// Softmax over all: Qwen2, DeepSeek.
    pub const ALL: Self = Self {
        scores: Scores::Softmax,
        single_precision: false,
        cap: None,
        correction: None,
        groups: None,
        from_end: false,
        normalization: Normalization::None,
        scale: None,
        result_scale: None,
        precision: WeightPrecision::SumRounded,
        identities: 0,
        on_inputs: false,
        balance: None,
    };
    /// Logistic scores in single precision with a correction for the choice: DeepSeek-V3 and those after it ("noaux_tc").
    pub const CORRECTED: Self = Self {
        scores: Scores::Sigmoid,
        single_precision: true,
        correction: Some(Correction::named("gate.e_score_correction_bias")),
        ..Self::ALL
    };
}

impl ExpertsSpec {
    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let Self { block, experts, router, networks, .. } = *self;
        let ExpertNetworks { intermediate, bias, .. } = networks;
        let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias };
        let stacked = |inputs, outputs| ModuleKind::Experts { experts, inputs, outputs, bias };
        let choices = experts + self.routing.identities;
        let map = ModuleKind::Linear { inputs: hidden, outputs: choices, bias: router.bias };
        push(&format!("{block}.{}", router.name), map);
        if let Some(correction) = self.routing.correction {
            push(&format!("{block}.{}", correction.name), ModuleKind::SideParameter { shape: vec![choices] });
        }
        let within = |name: &str| format!("{block}.{}.{name}", networks.name);
        match networks.form {
            ExpertForm::Gated => {
                push(&within("gate_proj"), stacked(hidden, intermediate));
                push(&within("up_proj"), stacked(hidden, intermediate));
                push(&within("down_proj"), stacked(intermediate, hidden));
            }
            ExpertForm::Latent { width, bias } => {
                let map = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias };
                push(&format!("{block}.fc1_latent_proj"), map(hidden, width));
                push(&format!("{block}.fc2_latent_proj"), map(width, hidden));
                push(&within("fc1"), stacked(width, intermediate));
                push(&within("fc2"), stacked(intermediate, width));
            }
            ExpertForm::GatedLatent { width, norm } => {
                let map = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: false };
                push(&format!("{block}.routed_expert_down_proj"), map(hidden, width));
                push(&format!("{block}.routed_expert_up_proj"), map(width, hidden));
                if norm {
                    push(&format!("{block}.routed_expert_norm"), ModuleKind::Norm { width, bias: false });
                }
                push(&within("gate_proj"), stacked(width, intermediate));
                push(&within("up_proj"), stacked(width, intermediate));
                push(&within("down_proj"), stacked(intermediate, width));
            }
            ExpertForm::Plain => {
                push(&within("fc1"), stacked(hidden, intermediate));
                push(&within("fc2"), stacked(intermediate, hidden));
            }
        }
        let Some(shared) = self.shared else { return };
        if let Some(gate) = shared.gate {
            push(&format!("{block}.{gate}"), ModuleKind::Linear { inputs: hidden, outputs: 1, bias: false });
        }
        if let Some(balance) = self.routing.balance {
            push(
                &format!("{block}.{balance}"),
                ModuleKind::Linear { inputs: hidden, outputs: 2, bias: true },
            );
        }
        let within = |name: &str| format!("{block}.{}.{name}", shared.name);
        if matches!(networks.form, ExpertForm::Gated | ExpertForm::GatedLatent { .. }) {
            push(&within("gate_proj"), linear(hidden, shared.intermediate));
        }
        push(&within("up_proj"), linear(hidden, shared.intermediate));
        push(&within("down_proj"), linear(shared.intermediate, hidden));
    }
}
