//! Test servers of our own and starters of real ones. Never linked into a product.
//!
//! Every starter is synchronous, gives a server that answers, on ports of its own, and stops it on drop, also after a panic. Several
//! instances of everything may run at once, in one test process or many. What the servers need is installed by `./run setup`;
//! when it is missing, a starter fails and says so.

pub mod data;
pub mod ganesha;
pub mod http;
pub mod moto;
pub mod port;
pub mod process;
pub mod sign;
pub mod target;
pub mod venv;
pub mod weed;

pub use ganesha::{Ganesha, GaneshaOptions};
pub use moto::Moto;
pub use process::{Guarded, scratch};
pub use target::S3Target;
pub use weed::Weed;
