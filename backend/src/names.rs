//! How the last part of an object key is shown as a POSIX name, and back. Pure; called by `object/` only.
//!
//! The listing of a directory (prefix `d/`, delimiter `/`) gives *segments*: the bytes of a key after the prefix, up to the next
//! `/`. A segment that is a possible POSIX name is shown unchanged, whatever its bytes: newline, invalid UTF-8, anything. The
//! others are spelt with an escape word that starts with `%efc-`:
//!
//! | segment | shown as |
//! |---|---|
//! | empty (`a//b`, a key that ends in `/` and has content) | `%efc-empty` |
//! | `.` | `%efc-dot` |
//! | `..` | `%efc-dotdot` |
//! | a NUL byte in it | `%efc-nul` in its place |
//! | a literal `%efc-` in it | `%efc-lit-` in its place |
//! | object `a` beside prefix `a/` | the directory is `a`, the object `a%efc-file` |
//!
//! What must stay true: [`decode`] undoes [`encode`]; two different (segment, beside a directory) pairs never share a name; a name
//! that [`encode`] does not produce decodes to nothing, so that no object has two names.
//!
//! It works because the one escape word that can appear through a segment's own bytes, `%efc-`, is always followed by `lit-` then,
//! and because `%efc-` cannot overlap itself (`%` occurs only at its start).

use std::borrow::Cow;

/// Longest name that is shown, bytes: what the kernel's FUSE accepts (`FUSE_NAME_MAX`).
pub const NAME_BYTES_MAX: usize = 1024;

const ESCAPE: &[u8] = b"%efc-";
const EMPTY: &[u8] = b"%efc-empty";
const DOT: &[u8] = b"%efc-dot";
const DOTDOT: &[u8] = b"%efc-dotdot";
const NUL: &[u8] = b"nul";
const LITERAL: &[u8] = b"lit-";
const FILE: &[u8] = b"%efc-file";

/// A decoded name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The bytes of the key segment.
    pub bytes: Vec<u8>,
    /// The name is that of an object which stands beside a directory of the same segment.
    pub beside_directory: bool,
}

/// The POSIX name of `segment`, which holds no `/`. `beside_directory`: it is an object's, and the directory has a prefix of the
/// same segment too.
/// Borrowed when it is the segment itself.
pub fn encode(segment: &[u8], beside_directory: bool) -> Cow<'_, [u8]> {
    let mut name = match segment {
        b"" => Cow::Borrowed(EMPTY),
        b"." => Cow::Borrowed(DOT),
        b".." => Cow::Borrowed(DOTDOT),
        _ if is_plain(segment) => Cow::Borrowed(segment),
        _ => Cow::Owned(escape(segment)),
    };
    if beside_directory {
        name.to_mut().extend_from_slice(FILE);
    }
    name
}

fn is_plain(segment: &[u8]) -> bool {
    !segment.iter().any(|b| *b == 0 || *b == b'%')
}

fn escape(segment: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(segment.len() + FILE.len());
    let mut rest = segment;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == 0 {
            out.extend_from_slice(ESCAPE);
            out.extend_from_slice(NUL);
        } else if let Some(after) = rest.strip_prefix(ESCAPE) {
            out.extend_from_slice(ESCAPE);
            out.extend_from_slice(LITERAL);
            rest = after;
            continue;
        } else {
            out.push(byte);
        }
        rest = tail;
    }
    out
}

/// The segment that is shown as `name`; `None` when no segment is.
pub fn decode(name: &[u8]) -> Option<Segment> {
    let (base, beside_directory) = match name.strip_suffix(FILE) {
        Some(base) => (base, true),
        None => (name, false),
    };
    let bytes = match base {
        EMPTY => Vec::new(),
        DOT => b".".to_vec(),
        DOTDOT => b"..".to_vec(),
        _ => unescape(base)?,
    };
    // Only canonical names count: `.`, an empty base, a `/` ... are refused here.
    let canonical = !bytes.contains(&b'/') && encode(&bytes, beside_directory) == name;
    canonical.then_some(Segment { bytes, beside_directory })
}

fn unescape(base: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(base.len());
    let mut rest = base;
    while let Some((&byte, tail)) = rest.split_first() {
        if let Some(word) = rest.strip_prefix(ESCAPE) {
            if let Some(after) = word.strip_prefix(NUL) {
                out.push(0);
                rest = after;
            } else {
                rest = word.strip_prefix(LITERAL)?;
                out.extend_from_slice(ESCAPE);
            }
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Segments made of the pieces that the mapping treats specially, and of plain bytes.
    fn segment() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            Just(b"%efc-".to_vec()),
            Just(b"%efc".to_vec()),
            Just(b"%".to_vec()),
            Just(b"-".to_vec()),
            Just(b"\0".to_vec()),
            Just(b".".to_vec()),
            Just(b"lit-".to_vec()),
            Just(b"nul".to_vec()),
            Just(b"file".to_vec()),
            Just(b"empty".to_vec()),
            Just(b"dot".to_vec()),
            Just(b"\n".to_vec()),
            vec(any::<u8>().prop_filter("no slash", |b| *b != b'/'), 0..4),
        ];
        vec(piece, 0..7).prop_map(|v| v.concat())
    }

    fn is_posix(name: &[u8]) -> bool {
        !name.is_empty() && name != b"." && name != b".." && !name.contains(&0) && !name.contains(&b'/')
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn round_trip(bytes in segment(), beside_directory: bool) {
            let name = encode(&bytes, beside_directory);
            prop_assert!(is_posix(&name));
            prop_assert_eq!(decode(&name), Some(Segment { bytes, beside_directory }));
        }

        #[test]
        fn no_two_keys_share_a_name(a in segment(), b in segment(), fa: bool, fb: bool) {
            prop_assume!((&a, fa) != (&b, fb));
            prop_assert_ne!(encode(&a, fa), encode(&b, fb));
        }

        #[test]
        fn any_name_decodes_to_its_own_segment_or_to_nothing(name in segment()) {
            if let Some(s) = decode(&name) {
                prop_assert_eq!(encode(&s.bytes, s.beside_directory).as_ref(), &name[..]);
            }
        }

        #[test]
        fn ordinary_names_are_unchanged(name in vec(any::<u8>(), 1..40)) {
            prop_assume!(is_posix(&name) && !name.windows(5).any(|w| w == ESCAPE));
            prop_assert_eq!(encode(&name, false).as_ref(), &name[..]);
        }
    }

    #[test]
    fn the_table() {
        for (segment, beside, name) in [
            (&b""[..], false, &b"%efc-empty"[..]),
            (b".", false, b"%efc-dot"),
            (b"..", false, b"%efc-dotdot"),
            (b"a\0b", false, b"a%efc-nulb"),
            (b"x%efc-y", false, b"x%efc-lit-y"),
            (b"a", true, b"a%efc-file"),
            (b"", true, b"%efc-empty%efc-file"),
            (b".", true, b"%efc-dot%efc-file"),
            (b"a\n\xff", false, b"a\n\xff"),
            (b"...", false, b"..."),
        ] {
            assert_eq!(encode(segment, beside), name);
        }
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", b"%efc-", b"%efc-x", b"%efc-file", b"%efc-dota"] {
            assert_eq!(decode(name), None, "{name:?}");
        }
    }
}
