//! Doubly linked lists over one array: entry `id` is in at most one list, links are array indexes.

/// No entry.
pub(super) const NONE: u32 = u32::MAX;

/// One entry's links and the figures every policy keeps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    prev: u32,
    next: u32,
    /// Bytes.
    pub(super) cost: u32,
    /// Hash of the key.
    pub(super) hash: u32,
    /// When it was last counted, on the policy's own clock.
    pub(super) stamp: u32,
    /// The list it is in; [`ABSENT`] if none.
    pub(super) list: u8,
}

/// `Node::list` of an entry in no list.
pub(super) const ABSENT: u8 = u8::MAX;

#[derive(Debug, Clone, Copy)]
struct Ends {
    head: u32,
    tail: u32,
    bytes: u64,
    len: u32,
}

/// `N` lists; the head is the most recent end.
#[derive(Debug)]
pub(super) struct Lists<const N: usize> {
    nodes: Vec<Node>,
    ends: [Ends; N],
}

impl<const N: usize> Default for Lists<N> {
    fn default() -> Self {
        Lists { nodes: Vec::new(), ends: [Ends { head: NONE, tail: NONE, bytes: 0, len: 0 }; N] }
    }
}

impl<const N: usize> Lists<N> {
    /// The entry, if it is in a list.
    pub(super) fn get(&self, id: u32) -> Option<&Node> {
        self.nodes.get(id as usize).filter(|n| n.list != ABSENT)
    }

    /// The entry, if it is in a list.
    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Node> {
        self.nodes.get_mut(id as usize).filter(|n| n.list != ABSENT)
    }

    /// Bytes in a list.
    pub(super) fn bytes(&self, list: u8) -> u64 {
        self.ends[list as usize].bytes
    }

    /// The least recent entry of a list, or [`NONE`].
    pub(super) fn tail(&self, list: u8) -> u32 {
        self.ends[list as usize].tail
    }

    /// Entries in all lists.
    pub(super) fn len(&self) -> usize {
        self.ends.iter().map(|e| e.len as usize).sum()
    }

    /// Puts a new entry at the head of `list`. An entry that is present already is moved and takes the new figures.
    pub(super) fn add(&mut self, id: u32, list: u8, hash: u32, cost: u32, stamp: u32) {
        self.unlink(id);
        let at = id as usize;
        if at >= self.nodes.len() {
            self.nodes.resize(at + 1, Node { prev: NONE, next: NONE, cost: 0, hash: 0, stamp: 0, list: ABSENT });
        }
        self.nodes[at] = Node { prev: NONE, next: NONE, cost, hash, stamp, list: ABSENT };
        self.push(id, list);
    }

    /// Moves a present entry to the head of `list`.
    pub(super) fn move_to(&mut self, id: u32, list: u8) {
        if self.unlink(id) {
            self.push(id, list);
        }
    }

    /// Takes an entry out; false if it was in no list.
    pub(super) fn unlink(&mut self, id: u32) -> bool {
        let Some(&Node { prev, next, cost, list, .. }) = self.get(id) else { return false };
        let ends = &mut self.ends[list as usize];
        ends.bytes -= cost as u64;
        ends.len -= 1;
        match prev {
            NONE => ends.head = next,
            p => self.nodes[p as usize].next = next,
        }
        match next {
            NONE => ends.tail = prev,
            n => self.nodes[n as usize].prev = prev,
        }
        self.nodes[id as usize].list = ABSENT;
        true
    }

    /// The least recent usable entry of `list`, looking at `scan_max` entries at most; it stays in the list.
    pub(super) fn oldest(&self, list: u8, scan_max: usize, usable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        let mut id = self.tail(list);
        for _ in 0..scan_max {
            if id == NONE {
                return None;
            }
            if usable(id) {
                return Some(id);
            }
            id = self.nodes[id as usize].prev;
        }
        None
    }

    /// Memory taken.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>()
    }

    fn push(&mut self, id: u32, list: u8) {
        let ends = &mut self.ends[list as usize];
        let old = ends.head;
        ends.head = id;
        if ends.tail == NONE {
            ends.tail = id;
        }
        ends.len += 1;
        let node = &mut self.nodes[id as usize];
        ends.bytes += node.cost as u64;
        node.prev = NONE;
        node.next = old;
        node.list = list;
        if old != NONE {
            self.nodes[old as usize].prev = id;
        }
    }
}
