//! Turns wishes into plans and requests into steps: valid requests, scheduler, prompt-cache index, placement, deployments, job table.
