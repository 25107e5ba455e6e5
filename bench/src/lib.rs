//! efc-bench
