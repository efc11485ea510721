//! What this machine is: memory, processor, name.

use crate::options::NodeOptions;
use mlxnode_compute::ByteCount;

/// Facts about the machine that do not change while the node runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MachineFacts {
    /// Name shown to people.
    pub(crate) name: String,
    /// Physical memory.
    pub(crate) memory_total: ByteCount,
    /// What models may use of it.
    pub(crate) memory_budget: ByteCount,
    /// Most that blocks of prompts may take of the budget in each worker.
    pub(crate) prompt_cache: ByteCount,
    /// "Apple M4 Max", or the processor's name on other systems.
    pub(crate) chip: String,
}

impl MachineFacts {
    /// Asks the system; the options decide where they say something.
    pub(crate) fn read(options: &NodeOptions) -> Self {
        let (memory_total, chip) = match sysinfo::System::new() {
            Ok(mut system) => {
                system.refresh_memory();
                system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
                let chip = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned());
                (ByteCount(system.total_memory()), chip.unwrap_or_default())
            }
            // Without knowing its memory the node takes no model unless --memory-budget says what it may use.
            Err(error) => {
                tracing::warn!(%error, "the system does not say how much memory it has");
                (ByteCount(0), String::new())
            }
        };
        let share = |bytes: ByteCount, share: f64| ByteCount((bytes.0 as f64 * share) as u64);
        let memory_budget =
            options.memory_budget.unwrap_or_else(|| share(memory_total, NodeOptions::DEFAULT_BUDGET_SHARE));
        let prompt_cache = options
            .prompt_cache_memory
            .unwrap_or_else(|| share(memory_budget, NodeOptions::DEFAULT_PROMPT_CACHE_SHARE));
        let name = options.name.clone().or_else(|| sysinfo::System::host_name().ok());
        let name = name.unwrap_or_else(|| "node".to_owned());
        Self {
            // macOS appends ".local" to the host's name; people do not say it.
            name: name.trim_end_matches(".local").to_owned(),
            memory_total,
            memory_budget,
            prompt_cache,
            chip: if chip.is_empty() { "unknown processor".to_owned() } else { chip },
        }
    }
}
