//! Ports for test servers. A port is leased: one file lock per port, held until the lease is dropped and shared by every
//! process that uses this crate, so that two tests never pick the same one. Leases lie below the range the kernel takes ports for outgoing
//! connections from (32768 on Linux), so those cannot collide with them either.

use crate::process::scratch_root;
use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};

const FIRST: u16 = 10_000;
const LAST: u16 = 32_000;

/// A leased TCP port on loopback.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: Flock<File>,
}

impl Port {
    /// Leases a port nobody listens on.
    ///
    /// # Errors
    /// When the scratch directory cannot be written or no port is free.
    pub fn lease() -> Result<Port> {
        let dir = scratch_root()?.join("ports");
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        for _ in 0..2000 {
            let number = rand::random_range(FIRST..LAST);
            let path = dir.join(number.to_string());
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
            let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            // Somebody outside this crate may have it.
            if TcpListener::bind((Ipv4Addr::UNSPECIFIED, number)).is_ok() {
                return Ok(Port { number, _lock: lock });
            }
        }
        bail!("no free port between {FIRST} and {LAST}")
    }

    /// Leases `N` ports.
    ///
    /// # Errors
    /// As [`Port::lease`].
    pub fn lease_many<const N: usize>() -> Result<[Port; N]> {
        let ports = (0..N).map(|_| Port::lease()).collect::<Result<Vec<_>>>()?;
        Ok(ports.try_into().expect("N ports were leased"))
    }

    /// The number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn leases_are_distinct_and_can_be_bound() {
        let leases: Vec<Port> = (0..50).map(|_| Port::lease().unwrap()).collect();
        let numbers: HashSet<u16> = leases.iter().map(Port::number).collect();
        assert_eq!(numbers.len(), 50);
        for port in numbers {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        }
    }
}
