//! The job table, alone and against a simulated cluster that dies everywhere: workers, nodes, the coordinator, all of it. The records say all
//! that counts.

mod chaos;
mod placing;
mod results;
mod table;
mod world;
