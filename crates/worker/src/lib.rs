//! Runs one shard of one model in its own process and passes the result on: stage service, links, collectives, job runner.
