//! Network namespaces joined to this host by one veth pair each, so that a test can put a mount on a node of its own and cut it off.

use anyhow::{Context, Result, ensure};
use std::process::Command;

fn ip(args: &str) -> Result<()> {
    let out = Command::new("ip").args(args.split_whitespace()).output().context("ip (iproute2)")?;
    ensure!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// A namespace.
#[derive(Debug)]
pub struct Node {
    /// Its name, for `nsenter --net=/run/netns/NAME`.
    pub name: String,
    outer: String,
}

impl Node {
    /// Cuts it off, or joins it again.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn cut(&self, off: bool) -> Result<()> {
        ip(&format!("link set {} {}", self.outer, if off { "down" } else { "up" }))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The veth pair goes with the namespace's end of it; after a failure there is nobody to tell.
        let _ = ip(&format!("link del {}", self.outer));
        let _ = ip(&format!("netns del {}", self.name));
    }
}

/// Namespaces that reach this host, and each other only through it.
#[derive(Debug)]
pub struct Lan {
    /// The namespaces.
    pub nodes: Vec<Node>,
    host: String,
}

impl Lan {
    /// Makes `n` namespaces.
    ///
    /// # Errors
    /// Without root or iproute2.
    pub fn new(n: usize) -> Result<Lan> {
        let net = (std::process::id() % 200) + 20;
        let mut lan = Lan { nodes: Vec::new(), host: format!("10.{net}.0.1") };
        for i in 0..n {
            let (name, outer) = (format!("efc-{}-{i}", std::process::id()), format!("efc{}v{i}", std::process::id()));
            let inner = format!("{outer}n");
            ip(&format!("netns add {name}"))?;
            lan.nodes.push(Node { name: name.clone(), outer: outer.clone() });
            ip(&format!("link add {outer} type veth peer name {inner} netns {name}"))?;
            ip(&format!("addr add 10.{net}.{i}.1/24 dev {outer}"))?;
            ip(&format!("link set {outer} up"))?;
            ip(&format!("-n {name} addr add 10.{net}.{i}.2/24 dev {inner}"))?;
            ip(&format!("-n {name} link set {inner} up"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} route add default via 10.{net}.{i}.1"))?;
        }
        Ok(lan)
    }

    /// The address by which every namespace reaches this host.
    pub fn host(&self) -> &str {
        &self.host
    }
}
