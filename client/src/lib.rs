//! What every process needs of a cluster: the workers as one cache ([`peers`]) over the data plane ([`wire`]), and the ring
//! that says who owns what ([`ring`]).

pub mod peers;
pub mod ring;
pub mod wire;
