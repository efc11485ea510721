//! RTN, mixed, AWQ, GPTQ, DWQ, dynamic; a Job.
