//! The benchmark: EFC beside other file systems over the same data and server, in one run.
//!
//! [`data`] makes the files, [`run`] takes each tool through each test (a fresh mount and an empty cache every time), [`work`] reads and
//! verifies, [`proc`] counts what the daemons cost, [`report`] turns measurements into tables, ratios and JSON. `README.md` explains every
//! number. What must stay true: all tools do the same work in the same run, every byte read is checked, whatever touches a
//! mount has a deadline, and nothing is left behind, whichever way the run ends.

pub mod ballast;
pub mod cli;
pub mod data;
pub mod juicefs;
pub mod proc;
pub mod report;
pub mod run;
pub mod tmpfs;
pub mod tool;
pub mod work;
pub mod writes;
