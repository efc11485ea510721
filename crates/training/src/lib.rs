//! LoRA, DoRA, full: datasets, losses, optimizers, the resumable loop; a Job.
