//! Puts one node together and takes it down: configuration, actors and their restart policy, listeners, telemetry, worker processes.
