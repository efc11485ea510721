//! Plans and shortages in sentences.

use super::refusal::Shortage;
use super::{NodeBudget, Plan, WORKER_RESERVE};
use std::fmt::{self, Write as _};

pub(super) fn plan(plan: &Plan) -> String {
    let mut text = String::new();
    let total = plan.weights() + plan.kv();
    let _ = writeln!(
        text,
        "{} with {} layers: {} of weights and {} of KV cache ({} tokens of context for {}), {total} together.",
        plan.architecture,
        plan.layer_count,
        plan.weights(),
        plan.kv(),
        plan.context_tokens,
        counted(plan.concurrent_sequences, "sequence"),
    );
    for stage in &plan.stages {
        let prompts = match stage.prompts.0 {
            0 => String::new(),
            _ => format!(", {} for prompts that are remembered", stage.prompts),
        };
        let _ = writeln!(
            text,
            "{} runs layers {} ({} of {}): {} of weights, {} of KV cache and {} of working space{prompts}, {} in all.",
            stage.node_name,
            stage.layers,
            stage.layers.len(),
            plan.layer_count,
            stage.weights,
            stage.kv,
            stage.reserve,
            stage.memory(),
        );
    }
    for budget in &plan.budgets {
        let NodeBudget { node_name, budget: all, used, planned, .. } = budget;
        if planned.0 == 0 {
            let _ = writeln!(text, "{node_name} is not needed ({} free).", budget.left());
        } else {
            let _ = writeln!(
                text,
                "{node_name} may use {all}, of which {used} is taken; this adds {planned} and leaves {}.",
                budget.left()
            );
        }
    }
    match plan.tokens_per_second {
        Some(speed) => {
            let _ = writeln!(text, "Predicted: about {speed:.1} tokens per second for one sequence.");
        }
        None => text.push_str("No speed is predicted: the memory bandwidth of a node is not known.\n"),
    }
    if let Some((fewest, speed)) = plan.fewest {
        let _ = write!(text, "It would fit on {} too", counted(fewest, "node"));
        if let Some(speed) = speed {
            let _ = write!(text, ", at about {speed:.1} tokens per second");
        }
        text.push_str(": more stages add room and throughput of many requests, not speed for one.\n");
    }
    text.truncate(text.trim_end().len());
    text
}

impl fmt::Display for Shortage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "the model does not fit")?;
        if let Some(stages) = self.stages {
            write!(out, " in {}", counted(stages, "stage"))?;
        }
        write!(
            out,
            ": it needs {} for weights, {} for the KV cache ({} tokens of context for {}) and {WORKER_RESERVE} for each worker; ",
            self.weights,
            self.kv,
            self.context_tokens,
            counted(self.sequences, "sequence"),
        )?;
        let free: Vec<String> =
            self.free.iter().map(|(name, free)| format!("{name} has {free} free")).collect();
        write!(out, "{}", free.join(", "))?;
        if self.missing.0 > 0 {
            write!(out, "; at least {} is missing", self.missing)?;
        } else {
            write!(
                out,
                "; that would be enough in sum, but not with these pieces (the largest that cannot be divided is {})",
                self.largest_piece
            )?;
        }
        let mut advice = Vec::new();
        if let Some(stages) = self.advice.stages {
            advice.push(format!("{} instead", counted(stages, "stage")));
        }
        if let Some(tokens) = self.advice.context_tokens {
            advice.push(format!("a context of {tokens} tokens"));
        }
        if let Some(sequences) = self.advice.sequences {
            advice.push(counted(sequences, "sequence") + " at a time");
        }
        if let Some(bits) = self.advice.weight_bits {
            advice.push(format!("the model quantized to {bits} bits"));
        }
        if let Some(bytes) = self.advice.further_node {
            advice.push(format!("a further node with {bytes} free"));
        }
        if advice.is_empty() {
            return Ok(());
        }
        write!(out, "; what would fit: {}", advice.join(", or "))
    }
}

fn counted(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}
