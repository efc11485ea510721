//! What is known of the cluster's parts, with the names that `--json` and the page's endpoints write: scripts rely on them. A picture adds to
//! them what the parts do now.

mod wire;

use serde::Serialize;

/// Who decides.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Coordinator {
    /// In hex.
    pub node_id: String,
    /// Its name; empty when it is not in the roster.
    pub name: String,
    /// False: what is said about models may be old.
    pub reachable: bool,
}

/// A link from a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Link {
    /// Id of the other node.
    pub to: String,
    /// `null` while nothing was measured.
    pub rtt_seconds: Option<f64>,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NodeFacts {
    /// In hex.
    pub id: String,
    /// Its name.
    pub name: String,
    /// HOST:PORT of its gRPC listener.
    pub address: String,
    /// "connecting", "alive", "suspect", "dead".
    pub state: &'static str,
    /// Of the machine, in bytes.
    pub memory_total_bytes: u64,
    /// What models may use.
    pub memory_budget_bytes: u64,
    /// What they use.
    pub memory_used_bytes: u64,
    /// Processor.
    pub chip: String,
    /// Release of mlxnode.
    pub version: String,
    /// As the node that answered measures them; in a picture, as each one does.
    pub links: Vec<Link>,
    /// Why there is no link to it; `null` while there is one.
    pub problem: Option<String>,
}

/// A deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DeploymentFacts {
    /// What requests call it.
    pub model: String,
    /// Where the weights come from.
    pub source: String,
    /// "llama", "qwen3" …
    pub architecture: String,
    /// Raised by every new plan.
    pub epoch: u64,
    /// "loading", "ready", "recovering", "failed", "unloading".
    pub state: &'static str,
    /// Why, when that needs saying.
    pub detail: String,
    /// Longest sequence in tokens.
    pub context_tokens: u32,
    /// What changes it for the requests that ask for `MODEL:ADAPTER`.
    pub adapters: Vec<Adapter>,
    /// Which of the model's replicas (1, 2, …); each is an entry of the list.
    pub replica: u32,
    /// How many there are.
    pub replicas: u32,
    /// It stays until somebody unloads it.
    pub pinned: bool,
    /// It is unloaded when nobody asked for so long; `null`: it is not.
    pub ttl_seconds: Option<u64>,
    /// How tokens are guessed ahead; `null`: they are not.
    pub guessing: Option<Guessing>,
}

/// An adapter of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Adapter {
    /// Its name in the deployment.
    pub name: String,
    /// A folder, or a Hugging Face id.
    pub source: String,
    /// Why it cannot be used now; `null` while it can.
    pub problem: Option<String>,
}

/// How a deployment guesses tokens ahead.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Guessing {
    /// `null` when what came before in the text says.
    pub draft_model: Option<String>,
    /// Most tokens that must have come before; `null` with a draft model.
    pub prompt_lookup: Option<u32>,
    /// At once.
    pub num_draft_tokens: u32,
}

/// A stage of a deployment, or of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StageFacts {
    /// Name of the node.
    pub node: String,
    /// In hex.
    pub node_id: String,
    /// First layer.
    pub layer_start: u32,
    /// The one after the last.
    pub layer_end: u32,
    /// Of the weights.
    pub weight_bytes: u64,
    /// Reserved for the KV cache.
    pub kv_bytes: u64,
    /// `null` while there is no worker.
    pub worker_pid: Option<u32>,
}

/// A plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Plan {
    /// Is there room?
    pub fits: bool,
    /// Sentences for a person.
    pub explanation: String,
    /// The model's family.
    pub architecture: String,
    /// Its layers.
    pub layers: u32,
    /// Tokens of context.
    pub context_tokens: u32,
    /// All weights.
    pub total_weight_bytes: u64,
    /// All KV caches.
    pub total_kv_bytes: u64,
    /// `null` when nothing is known about the nodes' speed.
    pub predicted_tokens_per_second: Option<f64>,
    /// Where the layers would be.
    pub stages: Vec<StageFacts>,
    /// What each node brings.
    pub budgets: Vec<Budget>,
}

/// What a node brings to a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Budget {
    /// Name of the node.
    pub node: String,
    /// In hex.
    pub node_id: String,
    /// What models may use there.
    pub budget_bytes: u64,
    /// What they use.
    pub used_bytes: u64,
    /// What this plan would add.
    pub planned_bytes: u64,
}
