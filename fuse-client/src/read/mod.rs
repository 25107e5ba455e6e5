//! x
pub mod parts;
pub mod stream;
