//! Test servers of our own and starters of real ones. Never linked into a product.
//!
//! Every starter is synchronous, gives a server that answers, on ports of its own, and stops it on drop, also after a panic. Several
//! instances of everything may run at once, in one test process or many. What the servers need is installed by `./run setup`;
//! when it is missing, a starter fails and says so.

pub mod data;
pub mod fuse;
pub mod ganesha;
pub mod http;
pub mod listing;
pub mod moto;
pub mod oss;
pub mod port;
pub mod process;
pub mod s3ro;
pub mod sign;
pub mod target;
pub mod venv;
pub mod weed;
pub mod xml;

pub use data::{Manifest, Profile, make_tree};
pub use fuse::FuseGuard;
pub use ganesha::{Ganesha, GaneshaOptions};
pub use moto::Moto;
pub use oss::{Action, Dialect, Fault, Identity, OssOptions, OssServer};
pub use process::{Guarded, scratch};
pub use s3ro::{S3Ro, S3RoStats};
pub use target::S3Target;
pub use weed::Weed;
