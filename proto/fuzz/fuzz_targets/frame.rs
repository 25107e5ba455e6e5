//! Any bytes into the frame reader.
#![no_main]

mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::any_bytes(bytes));
